"""How a federation grows: clients, participants, processes, tasks.

    python benchmarks/scale.py [--only clients participants processes tasks distillation]

Every figure comes from processes of their own; tables and machine go to benchmarks/results/scale.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from speed_sections import machine

OUT = Path(__file__).parent / "results/scale"
VIT = {"name": "test_vit", "weights": "random", "image_size": 32}
TINY = {"foundation": VIT, "small_model": "test_resnet", "small_image_size": 16, "feature_dim": 16, "blocks": [1]}
FEDLSCL = {"collaborator": TINY, "local_epochs": 1, "batch_size": 16, "buffer_per_class": 2}
DATA = {
    "dataset": "fake", "fake_classes": 8, "image_size": 16, "num_clients": 1000, "num_tasks": 2,
    "private_classes": 0, "public_classes": 4, "train_per_class": 4000, "test_per_class": 4,
}  # fmt: skip


def federation(trainer: dict, method: dict, data: dict) -> dict:
    """Fit Fed-LSCL once in this process; resident memory in MB and seconds after every round."""
    from fedlscl.callbacks import Callback
    from fedlscl.data import SpatialTemporalDataModule
    from fedlscl.federated.state import RunState
    from fedlscl.federated.trainer import FederatedTrainer
    from fedlscl.methods import FedLSCL
    from fedlscl.nets.collaborator import CollaboratorConfig
    from fedlscl.nets.vit import FoundationConfig

    class Meter(Callback):
        def __init__(self) -> None:
            self.rows: list[dict] = []

        def on_fit_start(self, run: RunState) -> None:
            self.began = time.perf_counter()

        def on_round_start(self, run: RunState) -> None:
            self.round_began = time.perf_counter()

        def on_round_end(self, run: RunState) -> None:
            task, round_ = run.progress.position
            seconds = time.perf_counter() - self.round_began
            self.rows.append({"task": task, "round": round_, "seconds": seconds, "rss_mb": resident()})

    shape = dict(method.pop("collaborator"))
    shape["foundation"] = FoundationConfig(**shape["foundation"])
    meter = Meter()
    federated = FederatedTrainer(accelerator="cpu", callbacks=[meter], **trainer)
    federated.fit(FedLSCL(collaborator=CollaboratorConfig(**shape), **method), SpatialTemporalDataModule(**data))
    client = federated.clients[0]
    with federated.run.engine.on_device(client):
        client_mb = client.num_bytes / 1e6
    return {
        "rounds": meter.rows,
        "seconds": time.perf_counter() - meter.began,
        "rss_mb": resident(),
        "client_mb": client_mb,
    }


def resident() -> float:
    """Resident memory of this process now, MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def child(trainer: dict, method: dict | None = None, data: dict | None = None) -> dict:
    """``federation`` in a fresh process."""
    asked = {"trainer": trainer, "method": {**FEDLSCL, **(method or {})}, "data": {**DATA, **(data or {})}}
    command = [sys.executable, __file__, "--child", json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def clients() -> list[dict]:
    """1,000 clients, 20 rounds, a tenth of them in each; in memory, and with all but a few in files."""
    rows = []
    for name, budget in (("in memory", 16.0), ("2 MB for idle clients", 0.002)):
        run = child({"rounds_per_task": 20, "participation": 0.1, "clients_gb": budget, "max_tasks": 1})
        later = [row for row in run["rounds"] if row["round"] >= 3]
        steps = torch.tensor([row["round"] for row in later]).double()
        memory = torch.tensor([row["rss_mb"] for row in later]).double()
        slope = ((steps - steps.mean()) * (memory - memory.mean())).sum() / (steps - steps.mean()).square().sum()
        seconds = [row["seconds"] for row in later]
        rows.append(
            {
                "clients": name,
                "MB after round 4": round(later[0]["rss_mb"], 1),
                "MB after round 20": round(later[-1]["rss_mb"], 1),
                "slope MB per round": round(float(slope), 3),
                "median s per round": round(sorted(seconds)[len(seconds) // 2], 2),
                "kB of a client": round(1000 * run["client_mb"], 1),
            }
        )
    return rows


def participants() -> list[dict]:
    """Seconds of a round against how many of 1,000 clients take part."""
    rows = []
    for number in (25, 50, 100, 200):
        run = child({"rounds_per_task": 5, "participation": number / 1000, "max_tasks": 1})
        seconds = sorted(row["seconds"] for row in run["rounds"][1:])[2]
        each = round(1000 * seconds / number, 1)
        rows.append({"participants": number, "s per round": round(seconds, 2), "ms per participant": each})
    return rows


def tasks() -> list[dict]:
    """Seconds and memory against the number of tasks and of images."""
    rows = []
    for number, images in ((2, 200), (4, 200), (8, 200), (4, 400), (4, 800)):
        data = {"num_clients": 5, "num_tasks": number, "public_classes": 2 * number, "fake_classes": 2 * number}
        run = child({"rounds_per_task": 2}, data={**data, "train_per_class": images})
        size = {"tasks": number, "images per class": images}
        seconds = {"s": round(run["seconds"], 1), "s per task": round(run["seconds"] / number, 2)}
        rows.append(size | seconds | {"MB": round(run["rss_mb"])})
    return rows


def processes() -> list[dict]:
    """One process against two on the same federation, single-threaded each; the files have to be equal."""
    config = Path(__file__).parent.parent / "configs/digits.yaml"
    seconds: dict[int, list[float]] = {1: [], 2: []}
    found: dict[int, bytes] = {}
    with tempfile.TemporaryDirectory() as folder:
        for repetition in range(3):
            for number in (1, 2):
                name = f"{number}_{repetition}"
                options = [
                    "--trainer.devices",
                    str(number),
                    "--trainer.default_root_dir",
                    folder,
                    "--trainer.name",
                    name,
                ]
                size = ["--data.num_clients", "4", "--data.private_classes", "2", "--data.public_classes", "0"]
                size += ["--data.num_tasks", "1", "--method.local_epochs", "3", "--trainer.rounds_per_task", "1"]
                command = [sys.executable, "-m", "fedlscl", "fit", "--config", str(config), *options, *size]
                subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
                run = Path(folder, name, "version_0")
                costs = json.loads((run / "costs.json").read_text())
                seconds[number].append(sum(row["seconds"] for row in costs["sessions"][0]["rounds"]))
                found[number] = (run / "results.json").read_bytes() + (run / "checkpoint.pt").read_bytes()
    one, two = (sorted(seconds[number])[1] for number in (1, 2))
    times = {"s of rounds, 1 process": round(one, 1), "2 processes": round(two, 1), "ratio": round(one / two, 2)}
    return [times | {"files equal": found[1] == found[2]}]


def distillation() -> list[dict]:
    """One-by-One Distillation for many clients: the sums are shared, so seconds grow with clients, not their square."""
    from fedlscl.functional.distillation import one_by_one_distill, second_moment

    torch.set_num_threads(1)
    rows = []
    for number in (10, 100, 1000):
        generators = [torch.randn(65, 1536) for _ in range(number)]
        moments = [second_moment(torch.randn(40, 64)) for _ in range(number)]
        began = time.perf_counter()
        one_by_one_distill(generators, moments, 1.0)
        seconds = time.perf_counter() - began
        rows.append({"clients": number, "s": round(seconds, 3), "ms per client": round(1000 * seconds / number, 2)})
    return rows


SECTIONS = {part.__name__: part for part in (clients, participants, processes, tasks, distillation)}


def table(rows: list[dict]) -> str:
    """Rows as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="How a federation grows.")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(federation(**json.loads(options.child))))
        return
    OUT.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        rows = SECTIONS[name]()
        text = f"{SECTIONS[name].__doc__.strip()}\n\n{table(rows)}\n"
        print(text, flush=True)
        about = {"processor": machine.processor(), "cores": os.cpu_count(), "torch": torch.__version__}
        (OUT / f"{name}.json").write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
        (OUT / f"{name}.md").write_text(text)


if __name__ == "__main__":
    main()
