"""Nodes and server killed in the middle of a run over Flower, ours and stock FedAvg side by side.

    python benchmarks/flower.py [--phase quiet|first|second|stock|stragglers|table ...] [--out DIR]

Fed-LSCL on digits (24 training images of each class), three clients, two tasks of two rounds, real processes with TLS
and node keys on loopback. In every round the SuperNode of one client is killed (SIGKILL, with all that it started)
while it works on its letter, and a supervisor starts it again; between the phases 'first' and 'second' everything is
killed, SuperLink and server included, in the middle of round 3. The disturbed run has to end with the same matrix as
the undisturbed one and as ``fedlscl fit``. In the phase 'stragglers' a node is stopped (SIGSTOP) while it works, a
different one in each of three rounds, and goes on when the round is over: the round has to end with its deadline.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from flower_network import EXAMPLE, QUIET, Network  # noqa: E402

PHASES = ("quiet", "first", "second", "stock", "stragglers", "table")
NODES = 3
OURS, STOCK = r"task (\d+), round (\d+): (\d) of (\d) clients in ([\d.]+) s", r"Received (\d) results and (\d) failures"
WORKING = "Receiving: train message"
DEADLINE = 100
"""Seconds of a round with a straggler; the other nodes are done by then."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--phase", nargs="+", choices=PHASES, default=PHASES)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "flower")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "flower_faults")
    options = parser.parse_args()
    # The processes of the trial are ended on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    options.work.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    for phase in options.phase:
        if phase != "table":
            found = globals()[phase](options.work.resolve())
            (options.out / f"{phase}.json").write_text(json.dumps(found, indent=1) + "\n")
            print(json.dumps(found))
    if "table" in options.phase:
        (options.out / "README.md").write_text(table(options.out))
    return 0


def quiet(work: Path) -> dict:
    """Simulation, and the same over the network without a fault."""
    network = fresh(work / "quiet")
    fit = [sys.executable, "-m", "fedlscl", "fit", "--config", str(network.folder / "app/federation/digits.yaml")]
    began = time.perf_counter()
    folder = ["--trainer.default_root_dir", str(network.folder / "sim"), "--trainer.accelerator", "cpu"]
    subprocess.run([*fit, *folder], check=True, capture_output=True, env={**os.environ, **QUIET})
    simulated = time.perf_counter() - began
    with Trial(network) as trial:
        trial.submit()
        trial.wait_for_end()
    (sim,) = network.folder.glob("sim/*/version_0/matrix.csv")
    same = sim.read_bytes() == (network.folder / "run/matrix.csv").read_bytes()
    rounds = json.loads((network.folder / "run/network.json").read_text())
    return {"seconds": trial.seconds, "simulation_seconds": simulated, "same_matrix": same, "rounds": rounds}


def first(work: Path) -> dict:
    """Kill a node in rounds 1 and 2, and everything in the middle of round 3."""
    network = fresh(work / "killed")
    with Trial(network) as trial:
        trial.submit()
        kills = [trial.kill_in_round(number, OURS, node=number % NODES) for number in (0, 1)]
        trial.wait_until_working(2, node=2)
    return {"seconds": trial.seconds, "kills": kills, "log": trial.lines(OURS), "everything_killed_in_round": 3}


def second(work: Path) -> dict:
    """Start again, kill a node in rounds 3 and 4, and compare."""
    network = Network(work / "killed", NODES)
    with Trial(network, is_new=False) as trial:
        trial.submit()
        kills = [trial.kill_in_round(number, OURS, node=(number + 2) % NODES) for number in (0, 1)]
        trial.wait_for_end()
    matrices = [(work / name / "run/matrix.csv").read_bytes() for name in ("quiet", "killed")]
    rounds = json.loads((network.folder / "run/network.json").read_text())
    log = trial.lines(OURS)
    return {
        "seconds": trial.seconds,
        "kills": kills,
        "log": log,
        "same_matrix": matrices[0] == matrices[1],
        "rounds": rounds,
    }


def stock(work: Path) -> dict:
    """The same faults on Flower's FedAvg, and its second run after the server was killed."""
    network = fresh(work / "stock", ROOT / "benchmarks" / "flower_stock")
    with Trial(network) as trial:
        trial.submit()
        kills = [trial.kill_in_round(number, STOCK, node=number % NODES) for number in (0, 1)]
        trial.wait_until_working(2, node=2)
        before = trial.lines(STOCK)
        trial.restart_everything()
        trial.submit()
        trial.wait_for(lambda: "[ROUND " in network.log("run").split("Successfully started run")[-1], 300)
        began_at = re.findall(r"\[ROUND (\d+)/", network.log("run").split("Successfully started run")[-1])[0]
    return {"seconds": trial.seconds, "kills": kills, "log": before, "round_after_restart": int(began_at)}


def stragglers(work: Path) -> dict:
    """Rounds 1 to 3 with a node that stands still; in the last one everybody is there again."""
    network = fresh(work / "stragglers")
    with Trial(network) as trial:
        trial.submit(DEADLINE)
        for number in range(NODES):
            trial.stop_in_round(number, OURS, node=number)
        trial.wait_for_end()
        ended = network.processes["run"].poll() == 0
    rounds = json.loads((network.folder / "run/network.json").read_text())
    late = [round(each["seconds"] - DEADLINE, 3) for each in rounds if each["missed"]]
    return {"seconds": trial.seconds, "deadline": DEADLINE, "seconds_after_it": late, "ended": ended, "rounds": rounds}


def fresh(folder: Path, source: Path = EXAMPLE) -> Network:
    """A new folder with keys and the app; the digits federation shortened to two tasks of few images."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copytree(source, folder / "app", ignore=shutil.ignore_patterns("__pycache__"))
    config = folder / "app/federation/digits.yaml"
    if config.exists():
        text = config.read_text().replace("rounds_per_task: 2", "rounds_per_task: 2\n  max_tasks: 2")
        text = text.replace("local_epochs: 2", "local_epochs: 1")
        config.write_text(f"{text}  train_per_class: 24\n  test_per_class: 12\n")
    return Network(folder, NODES)


class Trial:
    """A network that runs, with a supervisor for its nodes."""

    def __init__(self, network: Network, is_new: bool = True) -> None:
        self.network, self.is_new = network, is_new

    def __enter__(self) -> "Trial":
        self.began = time.perf_counter()
        self.network.start_link()
        for node in range(NODES):
            if self.is_new:
                self.network.register(node)
            self.network.start_node(node)
        self.nodes = set(range(NODES))
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = round(time.perf_counter() - self.began, 1)
        self.network.close()

    def submit(self, deadline: int = 900) -> None:
        """Start the run; a log of an earlier one stands before ``self.start``."""
        path = self.network.folder / "run.log"
        self.start = len(path.read_text()) if path.exists() else 0
        self.seen = [self.network.log(f"node{node}").count(WORKING) for node in range(NODES)]
        self.killed: list[int] = []
        is_ours = (self.network.folder / "app/federation").exists()
        given = {"run-dir": self.network.folder / "run", "deadline": deadline} if is_ours else {}
        self.network.run(self.network.folder / "app", **given)

    def lines(self, pattern: str) -> list[str]:
        """What the present run has reported about its rounds."""
        return [found[0] for found in re.finditer(pattern, self.network.log("run")[self.start :])]

    def wait_until_working(self, number: int, node: int) -> None:
        """Return when a node has its letter of the run's round ``number`` (from 0), and a second for its work."""
        due = self.seen[node] + number + 1 + self.killed.count(node)
        self.wait_for(lambda: self.network.log(f"node{node}").count(WORKING) >= due, 900)
        time.sleep(2)

    def kill_in_round(self, number: int, pattern: str, node: int) -> dict:
        """Kill a node that works, start it again, and say how long the round took from then on."""
        self.wait_until_working(number, node)
        self.network.kill(f"node{node}")
        self.killed.append(node)
        began = time.perf_counter()
        self.wait_for(lambda: len(self.lines(pattern)) > number, 900)
        return {"round": number + 1, "node": node, "seconds_to_round_end": round(time.perf_counter() - began, 1)}

    def stop_in_round(self, number: int, pattern: str, node: int) -> None:
        """Let a node that works stand still until the round is over."""
        self.wait_until_working(number, node)
        group = self.network.processes[f"node{node}"].pid
        os.killpg(group, signal.SIGSTOP)
        try:
            self.wait_for(lambda: len(self.lines(pattern)) > number, 900)
        finally:
            os.killpg(group, signal.SIGCONT)

    def wait_for_end(self) -> None:
        """Return when the run has ended."""
        process = self.network.processes["run"]
        self.wait_for(lambda: process.poll() is not None, 900)

    def restart_everything(self) -> None:
        """SIGKILL for all, then start all but the run."""
        self.network.close()
        self.network.start_link()
        for node in range(NODES):
            self.network.start_node(node)

    def wait_for(self, is_so, seconds: float) -> None:
        """Wait, and start nodes again that are not there."""
        end = time.perf_counter() + seconds
        while not is_so():
            if time.perf_counter() > end:
                raise TimeoutError(f"after {seconds} s: {self.network.log('run')[-2000:]}")
            for node in range(NODES):
                process = self.network.processes.get(f"node{node}")
                if process is None or process.poll() is not None:
                    self.network.start_node(node)
                    time.sleep(2)
            time.sleep(0.2)


def table(out: Path) -> str:
    """The committed page."""
    found = {
        name: json.loads((out / f"{name}.json").read_text()) for name in PHASES[:-1] if (out / f"{name}.json").exists()
    }
    rows = ["| run | fault | what happened |", "|---|---|---|"]
    if quiet := found.get("quiet"):
        seconds = ", ".join(f"{round_['seconds']:.0f}" for round_ in quiet["rounds"])
        same = "same" if quiet["same_matrix"] else "ANOTHER"
        rows.append(
            f"| ours | none | {same} matrix as `fedlscl fit`, byte for byte; seconds of the rounds: {seconds} |"
        )
    for phase in ("first", "second"):
        for kill in found.get(phase, {}).get("kills", ()):
            number = kill["round"] + (2 if phase == "second" else 0)
            done = found[phase]["log"][kill["round"] - 1]
            rows.append(f"| ours | round {number}: SIGKILL of node {kill['node']} | {done} |")
        if phase == "first" and phase in found:
            rows.append(
                "| ours | round 3: SIGKILL of SuperLink, server and all nodes | new `flwr run` goes on in round 3 |"
            )
    if "second" in found:
        same = "same" if found["second"]["same_matrix"] else "ANOTHER"
        rows.append(f"| ours | all of the above | {same} matrix as undisturbed, byte for byte |")
    if slow := found.get("stragglers"):
        late = ", ".join(f"{seconds:.2f}" for seconds in slow["seconds_after_it"])
        end = "run completed" if slow["ended"] else "RUN NOT COMPLETED"
        fault = f"rounds 1 to 3: SIGSTOP of a node until the round is over, deadline {slow['deadline']} s"
        rows.append(f"| ours | {fault} | rounds end {late} s after the deadline, without that node; {end} |")
    for kill, line in zip(found.get("stock", {}).get("kills", ()), found.get("stock", {}).get("log", ()), strict=False):
        rows.append(f"| stock FedAvg | round {kill['round']}: SIGKILL of node {kill['node']} | {line} |")
    if "stock" in found:
        began = found["stock"]["round_after_restart"]
        rows.append(
            f"| stock FedAvg | round 3: SIGKILL of all | new `flwr run` begins at round {began} with fresh weights |"
        )
    return "\n".join(["# Killed nodes and a killed server", "", *rows, ""])


if __name__ == "__main__":
    sys.exit(main())
