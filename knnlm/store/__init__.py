"""Keys and values on disk."""
