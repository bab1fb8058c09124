"""Experiments that check the theory, each with its tables and figures."""
