"""Fig. 3: which block of the frozen ViT is adapted.

python benchmarks/blocks.py --preset cpu --data_root DATA
"""

import sys

from sweep import parse, sweep, variant

BLOCKS = (0, 3, 6, 9, 11)
"""Counted from 0."""


def main() -> int:
    """Run what is missing; 0 when all is there."""
    options = parse("Fig. 3: which block of the frozen ViT is adapted.")
    rows = [variant(f"block{value}", options, collaborator__block=value) for value in BLOCKS]
    return 0 if sweep("blocks", rows, options) else 1


if __name__ == "__main__":
    sys.exit(main())
