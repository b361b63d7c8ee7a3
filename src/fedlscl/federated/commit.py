"""Which commit of this package works: known where it runs from a checkout."""

import os
import subprocess
from functools import cache
from pathlib import Path

import fedlscl


@cache
def package_commit() -> str | None:
    """The commit, with '-dirty' where tracked files were changed since; None without a checkout or without git."""
    # src/fedlscl/__init__.py: an installed package lies elsewhere, perhaps in another project's checkout.
    root = Path(fedlscl.__file__).parents[2]
    if not (root / ".git").exists() or not (root / "src" / "fedlscl").is_dir():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    # Without the lock a run never disturbs a git command of the user.
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True, env=environment)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
