"""Nouns of the project; standard library only."""
