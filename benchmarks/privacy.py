"""What an attacker learns from what clients upload: pictures, and who was in the data.

    python benchmarks/privacy.py --data_root data [--dataset cifar100_100x30.npz] [--small_model resnet18]
    python benchmarks/privacy.py --publish    # pages only, from what was measured before

The attacker is the server, or whoever reads what it receives. It knows the method, the frozen ViT, the public start of
every net, and has images of its own of the same kind. Results, plots and tables go to benchmarks/results/privacy, the
tables also to docs/privacy.md.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from privacy_sections.inversion import Attacker, from_features, from_moments, strip
from privacy_sections.members import members
from privacy_sections.noise import noise, noisy
from privacy_sections.page import PAGE, filled, readme
from privacy_sections.plots import draw, draw_strip
from privacy_sections.world import KNOWLEDGE, World, draw_pools

from fedlscl.data import NpzFile

OUT = Path(__file__).parent / "results" / "privacy"
SETS = {1: 90, 8: 24, 32: 9, 128: 9, 512: 6, 2048: 3}
"""Random sets by number of samples; sizes beyond the client's samples are left out."""
NOISY = {1: 60, 32: 12, 512: 6}
"""The same with noise."""
SIZES = [1, 2, 4, 8, 32, 128]
"""Samples of the moments that are inverted."""
STRIP_NOISE = 0.01
"""noise_multiplier of the strip's last row."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_root", type=Path, default=Path("data"))
    parser.add_argument("--dataset", default="cifar100_100x30.npz")
    parser.add_argument("--small_model", default="resnet18")
    parser.add_argument("--feature_dim", type=int, default=512, help="numbers of E")
    parser.add_argument("--shadow", type=int, default=4096, help="images of the attacker; from 64 on, times 4")
    parser.add_argument("--own", type=int, default=2560, help="images of the client")
    parser.add_argument("--others", type=int, default=512, help="images of nobody")
    parser.add_argument("--victims", type=int, default=256, help="images of the client that are reconstructed")
    parser.add_argument("--epochs", type=int, default=2, help="of Stage 1")
    parser.add_argument("--steps", type=int, default=800, help="of the convolutional decoder")
    parser.add_argument("--features", type=Path, help="keep the nets' features in this file, or take them from there")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--publish", action="store_true", help="write the pages from earlier results")
    options = parser.parse_args(arguments)
    if not options.publish:
        measure(options)
    (options.out / "README.md").write_text(readme(options.out))
    if options.out == OUT:
        PAGE.write_text(filled(PAGE.read_text(), OUT))
    return 0


def measure(options: argparse.Namespace) -> None:
    """All attacks, their numbers and pictures."""
    began, out = time.perf_counter(), options.out
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    data = NpzFile(str(options.data_root / options.dataset)).load()
    world = World(
        draw_pools(data, options.shadow, options.own, options.others),
        options.small_model,
        options.feature_dim,
        options.epochs,
    )
    world.look(options.features)
    say(began, "nets and features")
    attacker = Attacker(world, options.steps, options.victims)
    counts = [64 * 4**power for power in range(10) if 64 * 4**power <= options.shadow]
    found = {"features": from_features(attacker, counts)}
    say(began, "raw features inverted")
    found["moments"] = from_moments(attacker, counts[-1], SIZES)
    say(began, "moments inverted")
    found["members"] = members(world, upto(SETS, options.own))
    say(began, "members told apart")
    found["noise"] = noise(world, attacker, counts[-1], upto(NOISY, options.own))
    draw_strip(strip(attacker, counts[-1], noisy(STRIP_NOISE)), out / "strip.png")
    draw(found, out)
    found["conditions"] = {
        "data": options.dataset, "small_model": options.small_model, "image_size": data.train_images.shape[-1],
        "feature_dim": options.feature_dim, "epochs": options.epochs, "steps": options.steps,
        "shadow": options.shadow, "own": options.own, "others": options.others,
        "likeness": {name: world.likeness(*nets) for name, nets in KNOWLEDGE.items()},
        "seconds": round(time.perf_counter() - began),
    }  # fmt: skip
    (out / "results.json").write_text(json.dumps(rounded(found), indent=1) + "\n")
    say(began, "done")


def upto(sizes: dict[int, int], own: int) -> dict[int, int]:
    """Sizes that a client has samples for."""
    return {n: repeats for n, repeats in sizes.items() if n <= own}


def rounded(value):
    """Numbers with five digits."""
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def say(began: float, what: str) -> None:
    """A line of progress."""
    print(f"{time.perf_counter() - began:5.0f} s  {what}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
