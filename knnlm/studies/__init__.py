"""Studies of the other questions of arXiv 2506.24106, one folder each."""
