"""Fig. 5: how many samples of a class the buffer keeps.

python benchmarks/buffer.py --preset cpu --data_root DATA
"""

import sys

from sweep import parse, sweep, variant

SIZES = (0, 5, 10, 20)
"""M of Sec. 4.3; 0 is no replay."""


def main() -> int:
    """Run what is missing; 0 when all is there."""
    options = parse("Fig. 5: how many samples of a class the buffer keeps.")
    rows = [variant(f"M{value}", options, buffer_per_class=value) for value in SIZES]
    return 0 if sweep("buffer", rows, options) else 1


if __name__ == "__main__":
    sys.exit(main())
