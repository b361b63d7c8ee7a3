"""Fig. 5: how many samples of a class the buffer keeps.

python benchmarks/buffer.py --preset cpu --data_root DATA
"""

import argparse
import sys

from presets import Run, variant
from sweep import drive

SIZES = (0, 5, 10, 20)
"""M of Sec. 4.3; 0 is no replay."""


def experiments(options: argparse.Namespace) -> dict[str, list[Run]]:
    """A row for each size."""
    return {"buffer": [variant(f"M{value}", options, buffer_per_class=value) for value in SIZES]}


if __name__ == "__main__":
    sys.exit(drive("Fig. 5: how many samples of a class the buffer keeps.", experiments))
