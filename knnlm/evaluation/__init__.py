"""Perplexity of the kNN-LM: fitted on one part of the evaluation text, reported on the other."""
