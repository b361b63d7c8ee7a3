"""Fig. 5: how many samples of a class the buffer keeps.

python benchmarks/buffer.py --preset cpu --data_root DATA
"""

import sys

from sweep import Run, parse, sweep

SIZES = (0, 5, 10, 20, 40)
"""M of Sec. 4.3; 0 is no replay."""


def main() -> int:
    """Run what is missing; 0 when all is there."""
    options = parse("Fig. 5: how many samples of a class the buffer keeps.")
    rows = [Run(f"M{value}", options.base, ["--method.buffer_per_class", str(value)]) for value in SIZES]
    return 0 if sweep("buffer", rows, options) else 1


if __name__ == "__main__":
    sys.exit(main())
