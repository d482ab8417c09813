"""Checkpoints ranked by rows of their output matrix, which no model is built for. (`knnlm rank-models`)"""
