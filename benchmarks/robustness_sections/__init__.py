"""Sections of benchmarks/robustness.py; they share what the tests have: tiny methods, malformed uploads, canaries."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "tests"))
