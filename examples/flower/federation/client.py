"""What a SuperNode runs."""

from pathlib import Path

from fedlscl.flower.apps import client_app

app = client_app(Path(__file__).parent)
