"""Sections of benchmarks/privacy.py: who knows what, and three attacks on what is uploaded."""
