"""The processes an agent starts: where concrete classes meet."""
