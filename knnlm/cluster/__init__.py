"""Several machines: parts made by Ray tasks, and searched by Ray actors."""
