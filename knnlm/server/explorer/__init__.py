"""The page that shows why the kNN-LM said something."""
