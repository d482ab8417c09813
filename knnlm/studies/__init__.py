"""The other questions of arXiv 2506.24106, a folder each."""
