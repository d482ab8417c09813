"""The kNN-LM in use: `generate()`, lm-eval, text generation, batches of rows, explanations."""
