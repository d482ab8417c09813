"""Sets of questions and cloze items, without labels and with them. (`knnlm slices`)"""
