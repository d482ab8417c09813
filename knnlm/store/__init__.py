"""Datastores: keys and values on disk."""
