"""Difficulty of sets of questions and cloze items, with and without labels. (`knnlm slices`)"""
