"""What the SuperLink runs."""

from pathlib import Path

from fedlscl.flower.apps import server_app

app = server_app(Path(__file__).parent)
