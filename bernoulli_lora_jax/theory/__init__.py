"""Guarantees as numbers: what is proved, and whether a run keeps to it."""
