"""Fitted on one part of the text, reported on the other."""
