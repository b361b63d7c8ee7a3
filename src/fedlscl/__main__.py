"""The command line, ``fedlscl`` or ``python -m fedlscl``; torch and Lightning are imported only if needed."""

import contextlib
import io
import os
import select
import signal
import sys
from collections.abc import Sequence

from fedlscl import __version__
from fedlscl.cli import COMMANDS, did_you_mean, explain, report

HELP = """\
usage: fedlscl COMMAND [--config FILE] [--GROUP.OPTION VALUE ...]

Large-small model collaboration for federated continual learning.

commands:
  fit        train all tasks: fedlscl fit --config configs/digits.yaml; --dry_run estimates time and traffic
  validate   accuracies of a trained run on its held-out images
  test       the same as validate
  predict    classes of image files: fedlscl predict --ckpt_path RUN --images FOLDER
  report     one table over runs, or with --out a page: fedlscl report RUN [RUN ...] --out DIR
  methods    list the methods
  doctor     check this machine: fedlscl doctor --config FILE --data_root DIR
  completion TAB completion: eval "$(fedlscl completion bash)", or zsh

options:
  --version  show the version and exit
  -h, --help show this help and exit; fedlscl COMMAND --help lists the options of a command
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 2 for bad input, 130 when interrupted, 141 on a closed pipe."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        # What the terminal cannot show is printed as escapes.
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")
    try:
        status = _run(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError):
            # The remaining output is discarded.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        return fail(f"standard output cannot be written ({error.strerror}): free some space or write to another file.")
    return status


def _run(given: list[str]) -> int:
    if not given or given[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0
    if given[0] in ("-V", "--version"):
        print(f"fedlscl {__version__}")
        return 0
    if given[0] not in COMMANDS:
        hint = did_you_mean(given[0], COMMANDS, f"choose from {', '.join(COMMANDS)}.")
        return fail(f"command {given[0]!r} is unknown: {hint}")
    try:
        if given[0] == "report":
            report(given[1:])
        else:
            from fedlscl.cli.app import run

            run(given)
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except KeyboardInterrupt as stopped:
        print(f"\nfedlscl: interrupted{''.join(f': {hint}' for hint in stopped.args)}", file=sys.stderr)
        return 130
    except Exception as error:
        message = explain(error)
        if message is None or (isinstance(error, BrokenPipeError) and _is_output_closed()):
            raise
        return fail(message)
    return 0


def _is_output_closed() -> bool:
    poll = select.poll()
    with contextlib.suppress(OSError, ValueError):
        poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def fail(message: str) -> int:
    """Print one line on stderr and return the exit status of bad input."""
    print(f"fedlscl: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
