"""Flax Linen models, in files of their own."""
