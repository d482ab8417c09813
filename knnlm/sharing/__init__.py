"""A datastore to the Hugging Face hub."""
