"""A web page that explains the kNN-LM's predictions, and its API."""
