"""Slow, literal versions of the paper's equations that the fast ones are compared with."""
