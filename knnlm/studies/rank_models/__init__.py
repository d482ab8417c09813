"""Ranking of checkpoints by rows of their output matrices, without loading the models. (`knnlm rank-models`)"""
