"""Forks processes that run the command line and may kill themselves; starting each from scratch would take minutes.

Reads one JSON object per line from stdin: arguments, folder, the method's name, the event at which to die as its kind
and number (null for never), and whether the run is watched by more than its results. Answers with the exit status. A
process that lives to its end writes the kinds of its events to events.json. Where ``traced`` is true, every line that
is executed in a server step or while a checkpoint is saved is an event, too; where ``full`` is a number, that call to
write, flush, link or rename a file and all later ones find the disk full.
"""

import errno
import io
import json
import os
import signal
import sys
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path

import torch

from fedlscl import methods
from fedlscl.__main__ import main
from fedlscl.callbacks.results import Results
from fedlscl.cli import commands
from fedlscl.federated import checkpoint, trainer
from fedlscl.modules import Learner

EVENTS: list[str] = []
COUNTS: Counter[str] = Counter()


def happens(kind, deadly, before_death=lambda: None):
    EVENTS.append(kind)
    COUNTS[kind] += 1
    if [kind, COUNTS[kind]] == deadly:
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

    def aggregate_and_happen(*args):
        answers = aggregate(*args)
        happens("server", deadly)
        return answers

    method.aggregate = aggregate_and_happen
    original = checkpoint.write_atomically

    def torn(path, *parts, **options):
        data = b"".join(bytes(part) for part in parts)
        half = path.with_name(f".{path.name}.tmp").write_bytes
        happens("half a file written", deadly, lambda: half(data[: len(data) // 2]))
        original(path, *parts, **options)
        happens("file in place", deadly)

    checkpoint.write_atomically = torn


def trace(owner, name, kind, deadly):
    """Every line that a function, or whatever it calls, executes is an event."""
    original = getattr(owner, name)

    def tracer(frame, event, argument):
        if event == "line":
            happens(kind, deadly)
        return tracer

    def wrapped(*args, **kwargs):
        sys.settrace(tracer)
        try:
            return original(*args, **kwargs)
        finally:
            sys.settrace(None)

    setattr(owner, name, wrapped)


def fill_disk(number):
    """The checkpoint's n-th call and all later ones fail as on a full disk."""
    left = [number]

    def shorten(owner, name):
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*args, **kwargs)

        setattr(owner, name, wrapped)

    for name in ("fsync", "link", "replace"):
        shorten(checkpoint.os, name)
    # The flush is where buffered bytes reach the disk.
    shorten(checkpoint, "write_atomically")


def run(arguments, folder, method, deadly, watched, traced=False, full=None):
    os.chdir(folder)
    for stream in (1, 2):
        os.dup2(os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    if not watched:
        # Curves and figures cost more than a tiny method.
        commands.observers = lambda: (Results(),)
    lay_traps(getattr(methods, method), deadly)
    if traced:
        trace(trainer.FederatedTrainer, "_aggregate", "line of the server step", deadly)
        trace(trainer, "save_checkpoint", "line of saving a checkpoint", deadly)
    if full is not None:
        fill_disk(full)
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
