"""Every forward pass over text."""
