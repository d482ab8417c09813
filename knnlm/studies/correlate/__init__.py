"""Correlation of dispersion with perplexity over segments of a text. (`knnlm correlate`)"""
