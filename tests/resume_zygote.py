"""Forks processes that run the command line and may kill themselves; starting each from scratch would take minutes.

Reads one JSON object per line from stdin: arguments, folder, the method's name, the event at which to die as its kind
and number (null for never), and whether the run is watched by more than its results. Answers with the exit status. A
process that lives to its end writes the kinds of its events to events.json.
"""

import io
import json
import os
import signal
import sys
from contextlib import redirect_stdout
from pathlib import Path

import torch

from fedlscl import methods
from fedlscl.__main__ import main
from fedlscl.cli import commands
from fedlscl.federated import checkpoint
from fedlscl.federated.results import Results
from fedlscl.modules.learner import Learner

EVENTS: list[str] = []


def happens(kind, deadly, before_death=lambda: None):
    EVENTS.append(kind)
    if [kind, EVENTS.count(kind)] == deadly:
        before_death()
        os.kill(os.getpid(), signal.SIGKILL)


def lay_traps(method, deadly):
    def before(owner, name, kind):
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            happens(kind, deadly)
            return original(*args, **kwargs)

        setattr(owner, name, wrapped)

    before(Learner, "training_step", "step")
    before(method, "end_task", "end of task")
    before(checkpoint.os, "replace", "file written, not yet in place")
    aggregate = method.aggregate

    def answered(*args):
        answers = aggregate(*args)
        happens("server", deadly)
        return answers

    method.aggregate = answered
    original = checkpoint.write_atomically

    def torn(path, *parts, **options):
        data = b"".join(bytes(part) for part in parts)
        half = path.with_name(f".{path.name}.tmp").write_bytes
        happens("half a file written", deadly, lambda: half(data[: len(data) // 2]))
        original(path, *parts, **options)
        happens("file in place", deadly)

    checkpoint.write_atomically = torn


def run(arguments, folder, method, deadly, watched):
    os.chdir(folder)
    for stream in (1, 2):
        os.dup2(os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    if not watched:
        # Curves and figures cost more than a tiny method.
        commands.observers = lambda: (Results(),)
    lay_traps(getattr(methods, method), deadly)
    status = main(arguments)
    Path("events.json").write_text(json.dumps(EVENTS))
    sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with redirect_stdout(io.StringIO()):
        # Imports everything that a run needs.
        main(["fit", "--print_config"])
        commands.observers()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                run(**json.loads(line))
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(99)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
