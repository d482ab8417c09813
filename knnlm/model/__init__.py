"""The language model: vectors of its layers, and log-probabilities. Knows no text."""
