"""What only a GPU can show: the CUDA tests, speed, parity with the CPU, resuming, and Table 1 at the gpu preset.

    python benchmarks/gpu.py --data_root DATA    # call again until it exits with 0; a call takes at most --limit_s
    python benchmarks/gpu.py --tiny              # every part at a tiny size, on a CPU where there is no GPU

Cases that are done are skipped. Results go to benchmarks/results/gpu, a folder per card and in it one JSON file per
part, with tiny ones to runs/gpu; docs/gpu.md shows them all and says what is missing.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
import yaml
from presets import CONFIGS
from speed_sections import machine, together, vit
from typing_extensions import override

from fedlscl.data import SpatialTemporalDataModule
from fedlscl.federated.engine import Precision
from fedlscl.federated.loggers import Timed
from fedlscl.federated.state import RunState
from fedlscl.federated.trainer import FederatedTrainer
from fedlscl.methods import FedLSCL, FedRidge, LoRM
from fedlscl.nets.collaborator import CollaboratorConfig
from fedlscl.nets.vit import FoundationConfig

ROOT = Path(__file__).parent.parent
OUT = ROOT / "benchmarks/results/gpu"
PAGE = ROOT / "docs/gpu.md"
MARKS = re.compile(r"(<!-- gpu -->\n).*?(<!-- end -->)", re.DOTALL)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TESTS = ("tests/devices/test_cuda.py", "tests/devices/test_half_weights.py", "tests/federated/test_scaling.py")
PATIENCE = 420
"""Seconds after which a part of a case in another process is stopped; it goes on with the next call."""
LOSS_TOLERANCE = 1e-4
"""Largest difference of a first step's loss between CUDA and CPU in float32."""
TITLES = {
    "tests": "Tests on the device",
    "vit": "ViT part of a Stage 1 step, 224 px, warm cache, forward and backward",
    "together": "Stage 1 step of five clients one after the other, and with one pass of the ViT over all their images",
    "rounds": "Rounds of the paper's run: five clients, ResNet-18 and ViT, random weights and images",
    "parity": "Float32 on the device against the CPU, tiny nets",
    "precision": "bf16 against float32 on the device, tiny nets",
    "resume": "A run that is killed and resumed",
    "table1": "Table 1 at the gpu preset",
}
Rows = list[dict]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=TITLES, default=list(TITLES), metavar="PART")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, whose figures mean nothing")
    parser.add_argument("--data_root", default="data", help="where CIFAR-100 and the ViT's weights are")
    parser.add_argument("--limit_s", type=float, default=480, help="begin no case after so many seconds")
    parser.add_argument("--publish", action="store_true", help="write the page from earlier results, measure nothing")
    options = parser.parse_args()
    deadline, is_whole = time.monotonic() + options.limit_s, True
    if not options.publish and DEVICE == "cpu" and not options.tiny:
        raise SystemExit("a CUDA device is needed: try the parts with --tiny.")
    folder = (ROOT / "runs/gpu" if options.tiny else OUT) / machine.key()
    for part in () if options.publish else options.only:
        for name, measure in CASES[part](options).items():
            if name in {row["case"] for row in rows_of(folder / f"{part}.json")}:
                continue
            left = deadline - time.monotonic()
            rows = measure(left) if left > 0 else None
            if rows is None:
                print(f"{part}, {name}: call again", flush=True)
                is_whole = False
                continue
            print(*({"part": part, "case": name, **row} for row in rows), sep="\n", flush=True)
            save(folder / f"{part}.json", [{"case": name, **row} for row in rows])
    if not options.tiny:
        publish()
    return 0 if is_whole else 3


def cases_of_tests(options: argparse.Namespace) -> dict[str, Callable[[float], Rows | None]]:
    return {path: lambda left, path=path: run_tests(path) for path in TESTS}


def run_tests(path: str) -> Rows:
    """Numbers of tests in a file by outcome."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "", path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment())
    last = done.stdout.strip().splitlines()[-1]
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    return [{"passed": 0, "failed": 0, "skipped": 0, **counts}]


def cases_of_vit(options: argparse.Namespace) -> dict[str, Callable[[float], Rows | None]]:
    if options.tiny:
        return {"test_vit block 0": lambda left: vit.compare("test_vit", 0, 4, 2)}
    return {name: lambda left, call=call: call() for name, call in vit.cases().items()}


def cases_of_together(options: argparse.Namespace) -> dict[str, Callable[[float], Rows | None]]:
    if options.tiny:
        return {"test_vit batch 2": lambda left: together.compare("test_vit", 2, "test_resnet", 2)}
    return {name: lambda left, call=call: call() for name, call in together.cases().items()}


class Rounds(Timed):
    """Seconds of every round, and those of its stages, server and evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[dict] = []

    @override
    def on_round_end(self, run: RunState) -> None:
        if run.engine.fabric.device.type == "cuda":
            torch.cuda.synchronize()
        lap = self.lap()
        place = {"task": run.progress.task, "round": run.progress.round, "seconds": self.round_seconds}
        self.found.append(
            {**place, "images": lap.images, **{f"{name}_s": value for name, value in lap.seconds.items()}}
        )


def cases_of_rounds(options: argparse.Namespace) -> dict[str, Callable[[float], Rows | None]]:
    paper = yaml.safe_load((CONFIGS / "imagenet_r.yaml").read_text())
    names = ["test_vit"] if options.tiny else ["deit_tiny_patch16_224", "vit_base_patch16_224"]
    precisions = [p for p in ("bf16-mixed", "32-true") if p == "32-true" or "bf16" in machine.precisions()]
    return {
        f"{name} {precision}": partial(time_rounds, paper, name, precision, options.tiny)
        for name in names
        for precision in precisions
    }


def time_rounds(paper: dict, name: str, precision: Precision, is_tiny: bool, left: float) -> Rows:
    """Two tasks of two rounds; later rounds of a task take as long as its second one, whose cache is warm."""
    split, shape = paper["data"], paper["method"]["init_args"]["collaborator"]
    split = {name: value for name, value in split.items() if name not in ("dataset", "root")}
    num_clients, rounds, tasks = split["num_clients"], paper["trainer"]["rounds_per_task"], split["num_tasks"]
    size = {"image_size": 32, "train_per_class": 2, "test_per_class": 1} if is_tiny else {"image_size": 224}
    # ImageNet-R has 30,000 images of 200 classes, four fifths of them for training.
    size = {"train_per_class": 120, "test_per_class": 30} | size
    data = SpatialTemporalDataModule(dataset="fake", fake_classes=200, **split, **size)
    vit_config = FoundationConfig(name=name, weights="random", image_size=32 if is_tiny else None)
    net = CollaboratorConfig(
        foundation=vit_config,
        small_model="test_resnet" if is_tiny else shape["small_model"],
        small_image_size=16 if is_tiny else shape["small_image_size"],
        blocks=shape["blocks"],
    )
    method = FedLSCL(collaborator=net, **({"local_epochs": 1} if is_tiny else {}))
    timed = Rounds()
    trainer = FederatedTrainer(
        accelerator=DEVICE, precision=precision, rounds_per_task=2, max_tasks=2, callbacks=[timed]
    )
    trainer.fit(method, data)
    warm = {found["task"]: found for found in timed.found if found["round"] == 1}
    # Two passes per task, before and after the last aggregation, over the images of all tasks so far.
    evaluation = warm[0].get("evaluation_s", 0.0)
    first, later = (warm[task]["seconds"] - warm[task].get("evaluation_s", 0.0) for task in (0, 1))
    filling = max(0.0, timed.found[0]["seconds"] - first)
    total = rounds * (first + (tasks - 1) * later) + tasks * filling + evaluation * tasks * (tasks + 1)
    peak = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None
    return [
        {
            "vit": name, "precision": precision, "clients": num_clients, "images": warm[1]["images"],
            "round_s": first, "round_with_stage_2_s": later, "evaluation_s": evaluation,
            "paper_run_s": total, "peak_gb": None if peak is None else peak / 2**30,
        }
    ]  # fmt: skip


def tiny_methods() -> dict[str, Callable]:
    """Methods whose stages have one step, so that the first losses are those of equal weights."""
    frozen = FoundationConfig(name="test_vit", weights="random", image_size=32)
    one_step = {"local_epochs": 1, "batch_size": 1000}
    shape = CollaboratorConfig(foundation=frozen, small_model="test_resnet", small_image_size=16, feature_dim=16)
    return {
        "FedLSCL": lambda: FedLSCL(collaborator=shape, buffer_per_class=3, **one_step),
        "LoRM": lambda: LoRM(foundation=frozen, rank=2, **one_step),
        "FedRidge": lambda: FedRidge(foundation=frozen),
    }


def learn(name: str, accelerator: str, precision: Precision) -> FederatedTrainer:
    """Two clients, two tasks, two rounds."""
    data = SpatialTemporalDataModule(
        dataset="fake", fake_classes=8, num_clients=2, num_tasks=2, private_classes=4, public_classes=0,
        train_per_class=16, test_per_class=16, image_size=16,
    )  # fmt: skip
    trainer = FederatedTrainer(
        accelerator=accelerator, precision=precision, rounds_per_task=2, deterministic=accelerator == "cuda"
    )
    trainer.fit(tiny_methods()[name](), data)
    return trainer


def cases_of_parity(options: argparse.Namespace) -> dict[str, Callable[[float], Rows | None]]:
    return {
        name: lambda left, name=name: differences(name, ("cpu", "32-true"), (DEVICE, "32-true"))
        for name in tiny_methods()
    }


def cases_of_precision(options: argparse.Namespace) -> dict[str, Callable[[float], Rows | None]]:
    return {
        name: lambda left, name=name: differences(name, (DEVICE, "32-true"), (DEVICE, "bf16-mixed"))
        for name in tiny_methods()
    }


def differences(name: str, *places: tuple[str, Precision]) -> Rows:
    """Largest differences of two runs: of losses in the first step, and of accuracies after the last task."""
    one, other = (learn(name, *place) for place in places)
    firsts = [
        [e["terms"]["loss"] for e in run.history if (e["task"], e["round"]) == (0, 0)] for run in (one.run, other.run)
    ]
    loss = max((abs(a - b) for a, b in zip(*firsts, strict=True)), default=None)
    accuracy = (one.matrix.values[1, :, :, -1] - other.matrix.values[1, :, :, -1]).abs().max().item()
    is_equal = None if loss is None or places[1][1] != "32-true" else loss <= LOSS_TOLERANCE
    return [{"method": name, "first_loss": loss, "accuracy": accuracy, "within_tolerance": is_equal}]


def cases_of_resume(options: argparse.Namespace) -> dict[str, Callable[[float], Rows | None]]:
    return {name: lambda left, name=name: killed(name) for name in ("FedLSCL", "FedRidge")}


def killed(name: str) -> Rows:
    """Whether a run that got SIGKILL after its first checkpoint and was resumed has the bytes of one that was not."""
    frozen = {"name": "test_vit", "weights": "random", "image_size": 32}
    net = {"foundation": frozen, "small_model": "test_resnet", "small_image_size": 16, "feature_dim": 16}
    arguments = {
        "FedLSCL": {"collaborator": net, "local_epochs": 1, "batch_size": 8},
        "FedRidge": {"foundation": frozen},
    }
    config = {
        "trainer": {"accelerator": DEVICE, "deterministic": True, "rounds_per_task": 3},
        "method": {"class_path": name, "init_args": arguments[name]},
        "data": {
            "dataset": "fake", "fake_classes": 6, "num_clients": 2, "num_tasks": 2, "private_classes": 2,
            "public_classes": 2, "train_per_class": 6, "test_per_class": 3, "image_size": 16,
        },
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for kind in ("whole", "killed"):
            place = Path(folder, kind)
            place.mkdir()
            (place / "config.yaml").write_text(yaml.safe_dump(config))
            command = [sys.executable, "-m", "fedlscl", "fit", "--config", "config.yaml"]
            if kind == "killed":
                process = subprocess.Popen(command, cwd=place, env=environment(), stdout=subprocess.DEVNULL)
                while process.poll() is None and not list(place.glob("runs/*/version_*/checkpoint.pt")):
                    time.sleep(0.01)
                process.send_signal(signal.SIGKILL)
                process.wait()
                command += ["--ckpt_path", "last"]
            subprocess.run(command, cwd=place, env=environment(), check=True, stdout=subprocess.DEVNULL)
            (run,) = place.glob("runs/*/version_*")
            found.append([(run / file).read_bytes() for file in ("checkpoint.pt", "results.json")])
    return [{"method": name, "was_killed": process.returncode == -signal.SIGKILL, "same_bytes": found[0] == found[1]}]


def cases_of_table1(options: argparse.Namespace) -> dict[str, Callable[[float], Rows | None]]:
    return {"table1": lambda left: table1(options, left)}


def table1(options: argparse.Namespace, left: float) -> Rows | None:
    """None while rows are missing."""
    command = [sys.executable, "benchmarks/table1.py", "--preset", "gpu", "--data_root", options.data_root]
    if options.tiny:
        command += ["--configs", "digits", "--only", "fedncm", "--seeds", "42", "--out", "runs/gpu/table1"]
    done = subprocess.run([*command, "--limit_s", str(min(left, PATIENCE))], cwd=ROOT, env=environment())
    return [{"runs": "tiny" if options.tiny else "runs/benchmarks/table1_gpu"}] if done.returncode == 0 else None


CASES: dict[str, Callable[[argparse.Namespace], dict[str, Callable[[float], Rows | None]]]] = {
    "tests": cases_of_tests,
    "vit": cases_of_vit,
    "together": cases_of_together,
    "rounds": cases_of_rounds,
    "parity": cases_of_parity,
    "precision": cases_of_precision,
    "resume": cases_of_resume,
    "table1": cases_of_table1,
}
"""Of each part, what gives its rows in the seconds that are left, or None to be called again; by name."""


def environment() -> dict[str, str]:
    """The package of this checkout for other processes."""
    return {**os.environ, "PYTHONPATH": str(ROOT / "src")}


def rows_of(path: Path) -> Rows:
    """Earlier results."""
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def save(path: Path, rows: Rows) -> None:
    """Add the rows of a case."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else machine.processor(),
        "torch": torch.__version__,
    }
    content = {
        "measured": datetime.now(UTC).isoformat(timespec="minutes"),
        "machine": about,
        "rows": rows_of(path) + rows,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def publish() -> None:
    """Write docs/gpu.md from the results of all cards."""
    text = "\n".join(sections())
    PAGE.write_text(MARKS.sub(lambda found: found[1] + text + "\n" + found[2], PAGE.read_text()))


def sections() -> Iterator[str]:
    """A table for each part and card; a line for each part that is missing."""
    for part, title in TITLES.items():
        yield f"### {title}\n"
        files = sorted(OUT.glob(f"*/{part}.json"))
        if not files:
            yield "CUDA figures are missing: this was not run on a GPU.\n"
        for file in files:
            content = json.loads(file.read_text())
            names = list(dict.fromkeys(name for row in content["rows"] for name in row))
            yield f"{content['machine']['device']}, torch {content['machine']['torch']}, {content['measured']}.\n"
            yield "| " + " | ".join(names) + " |\n|" + "---|" * len(names)
            yield from ("| " + " | ".join(cell(row.get(name)) for name in names) + " |" for row in content["rows"])
            yield ""


def cell(value: object) -> str:
    """A value in four significant digits.

    Example:
        >>> cell(0.123456), cell(None), cell(True)
        ('0.1235', '', 'yes')
    """
    if value is None or isinstance(value, bool):
        return {None: "", True: "yes", False: "no"}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
