"""The language model: the vectors of its layers, and log-probabilities; knows no text."""
