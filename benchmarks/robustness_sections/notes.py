"""What a section has found so far, so that one that is interrupted goes on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedlscl.federated.checkpoint import write_atomically


class Notes:
    """Results of steps by name, in a file where one is given.

    Args:
        path: of the file, which is removed when the section is done.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.found: dict[str, Any] = json.loads(path.read_text()) if path is not None and path.is_file() else {}

    def once(self, name: str, step: Callable[[], Any]) -> Any:
        """What a step gave, now or when it was first taken."""
        if name not in self.found:
            self.found[name] = step()
            if self.path is not None:
                write_atomically(self.path, json.dumps(self.found).encode())
        return self.found[name]

    def done(self) -> None:
        """Nothing is left to go on from."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
