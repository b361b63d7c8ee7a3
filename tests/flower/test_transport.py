from flwr.app import Context, RecordDict

from fedlscl.flower.apps import FlowerTransport
from tiny_methods import METHODS


def test_a_node_that_claims_another_ones_part_is_ignored_as_long_as_that_one_is_online(network):
    made = network(METHODS["FedNCM"]())
    for node, part in ((12, 1), (13, 5), (14, "x")):
        made.grid.contexts[node] = Context(
            1, node, {"partition-id": part, "state-dir": str(made.folder)}, RecordDict(), {"config": "-"}
        )
    # No integer at all is an error of that node's app, and comes back as one.
    made.grid.fault = lambda node, message: "error" if node == 14 else None
    said = []
    transport = FlowerTransport(made.grid, 2, said.append, pause=0.01, retry=0.02)
    replies = transport.exchange({0: b"nonsense", 1: b"nonsense"}, 30.0)
    assert transport.node_of_client == {0: 10, 1: 11} and replies.keys() == {0, 1}
    made.grid.offline = {11}
    transport.exchange({1: b"nonsense"}, 5.0)
    assert transport.node_of_client == {0: 10, 1: 12}
    assert (
        any("node 12 is ignored: node 11 has the same partition-id 1" in line for line in said)
        or 12 not in transport.unknown_nodes
    )


def test_letters_wait_until_a_node_is_there(network):
    made = network(METHODS["FedNCM"]())
    made.grid.offline = {10, 11}
    transport = FlowerTransport(made.grid, 2, pause=0.01)
    assert transport.exchange({0: b"nonsense"}, 0.05) == {} and made.grid.pushed == 0
    made.grid.offline = set()
    assert transport.exchange({0: b"nonsense"}, 30.0).keys() == {0}
