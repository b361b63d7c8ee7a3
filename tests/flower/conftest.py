"""A federation in one process: Flower's Grid without a network, its nodes built anew for every message."""

from types import SimpleNamespace

import pytest

pytest.importorskip("flwr", reason="the extra fedlscl[flower] is not installed")

from flwr.app import Context, Message, RecordDict
from flwr.app.error import Error
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fedlscl.federated.trainer import FederatedTrainer
from fedlscl.flower import apps
from fedlscl.flower.apps import FlowerTransport
from fedlscl.flower.federation import Federation
from fedlscl.flower.server import run_server


class LocalGrid(Grid):
    """Calls a ClientApp for every message pushed; ``fault(node, message)`` may say 'lost', 'error' or 'twice'."""

    def __init__(self, app, contexts, fault=lambda node, message: None):
        self.app, self.contexts, self.fault = app, contexts, fault
        self.replies, self.pushed, self.offline = {}, 0, set()

    def push_messages(self, messages):
        numbers = []
        for message in messages:
            self.pushed += 1
            number = str(self.pushed)
            message.metadata.__dict__["_message_id"] = number
            node = message.metadata.dst_node_id
            what = self.fault(node, message)
            if what == "error":
                self.replies[number] = Message(Error(0, "node was killed"), reply_to=message)
            elif what != "lost":
                for _ in range(2 if what == "twice" else 1):
                    self.replies[number] = self.app(message, self.contexts[node])
            numbers.append(number)
        return numbers

    def pull_messages(self, message_ids):
        return [self.replies.pop(number) for number in message_ids if number in self.replies]

    def get_node_ids(self):
        return [node for node in self.contexts if node not in self.offline]

    def create_message(self, *arguments, **options): ...

    def send_and_receive(self, *arguments, **options): ...

    def set_run(self, run): ...

    run = None


@pytest.fixture
def network(make_data, tmp_path, monkeypatch):
    """Make a network for a method: ``fit()`` runs it, ``grid`` and ``post`` can be disturbed."""

    def make(method, rounds_per_task=1, seed=42, data=make_data, folder=tmp_path, **options):
        def federation(**own):
            trainer = FederatedTrainer(rounds_per_task=rounds_per_task, accelerator="cpu", **options)
            return Federation(method, data(**own), trainer, seed, "same")

        monkeypatch.setattr("fedlscl.flower.federation.read_federation", lambda *path, **own: federation(**own))
        for name in ("_run_id", "_node_id", "_task_id"):
            monkeypatch.setattr(TaskIdentity, name, 1)
        places = range(federation().num_clients)
        contexts = {
            10 + i: Context(
                1, 10 + i, {"partition-id": i, "state-dir": str(folder / f"node{i}")}, RecordDict(), {"config": "-"}
            )
            for i in places
        }
        grid = LocalGrid(apps.client_app(folder), contexts)
        said = []

        def fit(deadline=60.0):
            transport = FlowerTransport(grid, len(contexts), said.append, pause=0.01, retry=0.02)
            return run_server(federation(), transport, folder / "run", deadline, said.append)

        return SimpleNamespace(grid=grid, fit=fit, said=said, folder=folder, federation=federation)

    return make
