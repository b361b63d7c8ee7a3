import json
import shutil

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedlscl.callbacks.results import write_results
from fedlscl.flower import apps
from fedlscl.flower.apps import from_record, to_record
from fedlscl.flower.federation import read_federation
from fedlscl.flower.messages import Request, pack, read_reply
from flower_network import EXAMPLE, ROOT, Network, missing


def test_the_example_has_the_configuration_of_the_demo():
    shipped = EXAMPLE / "federation" / "digits.yaml"
    assert shipped.read_bytes() == (ROOT / "configs" / "digits.yaml").read_bytes()


@pytest.mark.parametrize(
    ("node", "config", "reason"),
    [
        ({"partition-id": 0}, "digits.yaml", "state-dir is missing: add it to --node-config"),
        ({"partition-id": 7, "state-dir": "state"}, "digits.yaml", "partition-id must be in [0, 2], got 7"),
        ({"partition-id": 0, "state-dir": "state"}, "none.yaml", "none.yaml' cannot be read"),
        (
            {"partition-id": 0, "state-dir": "$MISSING"},
            "digits.yaml",
            "state-dir must be a path whose variables are set",
        ),
        ({"partition-id": 0, "state-dir": "s", "data-root": "$MISSING"}, "digits.yaml", "data.root must be a path"),
        ({"partition-id": 0, "state-dir": "state"}, "~/none.yaml", "HOME/none.yaml' cannot be read"),
        ({"partition-id": 0, "state-dir": "state"}, "digits.yaml", "client 0 has another configuration"),
    ],
)
def test_a_node_that_is_set_up_wrongly_says_so_in_one_line(node, config, reason, monkeypatch):
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    monkeypatch.delenv("MISSING", raising=False)
    monkeypatch.setenv("HOME", "/HOME")
    message = Message(to_record(pack(Request(0, "ab", "other", 0, [])._asdict())), 1, "train")
    message.metadata.__dict__["_message_id"] = "1"
    context = Context(1, 1, node, RecordDict(), {"config": config})
    reply = read_reply(from_record(apps.client_app(EXAMPLE / "federation")(message, context).content))
    assert reason in reply.refusal


def test_paths_of_a_node_are_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/HOME")
    monkeypatch.setenv("PLACE", "/place")
    options = {"state-dir": "~/state", "run-dir": "$PLACE/run", "config": "digits.yaml"}
    assert [str(apps.path_option(options, name)) for name in options] == ["/HOME/state", "/place/run", "digits.yaml"]


@pytest.mark.slow
@pytest.mark.skipif(bool(missing()), reason=f"absent: {', '.join(missing())}")
def test_three_nodes_with_tls_end_as_in_simulation_and_strangers_stay_outside(tmp_path):
    app = tmp_path / "app"
    shutil.copytree(EXAMPLE, app)
    config = app / "federation" / "digits.yaml"
    text = config.read_text().replace("rounds_per_task: 2", "rounds_per_task: 1\n  max_tasks: 1")
    config.write_text(f"{text}  train_per_class: 8\n  test_per_class: 4\n")
    (tmp_path / "foreign").mkdir()
    foreign = Network(tmp_path / "foreign", 1).keys
    network = Network(tmp_path, 3)
    try:
        network.start_link()
        for node in range(3):
            network.register(node)
            network.start_node(node)
        run = network.run(app, **{"run-dir": tmp_path / "run", "deadline": 250})
        ports = network.ports[4:]
        # The last one tries for ever.
        unknown_nodes = {
            "wrong_ca": "CERTIFICATE_VERIFY_FAILED",
            "unknown_key": "[code: 2004]",
            "no_key": "[code: 2001]",
        }
        refused = [
            network.start_node(0, ca=foreign / "ca.crt", name="wrong_ca", port=ports[0]),
            network.start_node(0, key=foreign / "node0", name="unknown_key", port=ports[1]),
            network.start_node(0, key=False, name="no_key", port=ports[2]),
        ]
        network.start_node(0, insecure=True, key=False, name="no_tls", port=ports[3])
        assert run.wait(280) == 0, network.log("run")
        assert [process.wait(20) for process in refused] == [1, 1, 1]
        for name, reason in {**unknown_nodes, "no_tls": "Connection attempt failed"}.items():
            assert reason in network.log(name) and "Receiving" not in network.log(name)
    finally:
        network.close()
    federation = read_federation(config)
    trainer = federation.trainer
    trainer.fit(federation.method, federation.datamodule, federation.seed)
    simulated = trainer.run
    simulated.run_dir = tmp_path / "simulated"
    simulated.run_dir.mkdir()
    write_results(simulated)
    assert (simulated.run_dir / "matrix.csv").read_bytes() == (tmp_path / "run" / "matrix.csv").read_bytes()
    found, wanted = (json.loads((tmp_path / run / "results.json").read_text()) for run in ("run", "simulated"))
    for name in ("data", "summary", "traffic", "parameters", "foundation", "method"):
        assert found[name] == wanted[name]
