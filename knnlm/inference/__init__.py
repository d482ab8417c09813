"""The kNN-LM where people already use language models."""
