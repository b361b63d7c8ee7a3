from copy import deepcopy

import pytest
import torch

from fedlscl.federated.method import Progress, StreamShape
from fedlscl.federated.payload import Upload
from fedlscl.functional.analytic import pack_symmetric
from fedlscl.methods.lorm import LoRM, merge_head, regression_mean, shares

TINY = {"local_epochs": 1, "batch_size": 8, "rank": 2, "lr": 0.01}
LAYERS = 24
"""Six blocks of test_vit, four layers each."""


class Watched(LoRM):
    """Keeps every net as it is before and after training, and every upload."""

    def stages(self, client):
        self.turns.append((client.task, client.round, client.id, deepcopy(client.net.state_dict())))
        yield from super().stages(client)
        self.turns.append((client.task, client.round, client.id, deepcopy(client.net.state_dict())))

    def aggregate(self, uploads, progress):
        answers = super().aggregate(uploads, progress)
        self.rounds.append((progress, uploads, answers))
        return answers


@pytest.fixture(scope="module")
def run(foundation_config, federate):
    """A finished run of two tasks of three rounds."""
    method = Watched(foundation=foundation_config, **TINY)
    method.turns, method.rounds = [], []
    return federate(method, rounds_per_task=3)


def moved(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_rounds_train_one_factor_of_one_task_in_turn(run):
    """B, A, B; and whatever is not trained is bit-identical on all clients, before and after."""
    turns = run.method.turns
    for before, after in zip(turns[::2], turns[1::2], strict=True):
        task, round_ = before[:2]
        factor = "down" if round_ == 1 else "up"
        adapters = {name for name in moved(before[3], after[3]) if name.startswith("lora.")}
        assert adapters == {f"lora.{n}.{factor}.{task}" for n in range(LAYERS)}
    by_place = {}
    for task, round_, _, state in turns[::2]:
        by_place.setdefault((task, round_), []).append(state)
    for states in by_place.values():
        first, *others = states
        assert all(torch.equal(first[name], other[name]) for other in others for name in first)


def test_a_task_starts_from_the_frozen_weights(run):
    """B_t is zero until round 0 trains it, so that W_0 + B_t A_t = W_0."""
    starts = [state for task, round_, _, state in run.method.turns[::2] if (task, round_) == (1, 0)]
    for state in starts:
        assert all(not state[f"lora.{n}.up.1"].any() for n in range(LAYERS))
        assert all(state[f"lora.{n}.up.0"].any() for n in range(LAYERS))


def test_a_task_does_not_touch_the_factors_of_the_one_before(run):
    turns = run.method.turns
    last_of_first = next(turn for turn in turns if turn[:2] == (1, 0))[3]
    for *_, state in [t for t in turns if t[0] == 1]:
        assert not {name for name in moved(last_of_first, state) if name.endswith(".0")}


def test_only_the_trained_factor_the_head_and_grams_travel(run):
    width, hidden, rank, classes = 64, 192, 2, 6
    inputs, outputs = 6 * (3 * width + hidden), 6 * (3 * width + width + hidden + width)
    head = (width + 1) * classes + width * (width + 1) // 2
    for progress, uploads, answers in run.method.rounds:
        for upload, answer in zip(uploads, answers, strict=True):
            size = sum(value.numel() for value in upload.payload.values())
            if progress.round == 1:
                assert size == rank * inputs + inputs + head
            else:
                assert size == rank * outputs + inputs + LAYERS * rank * (rank + 1) // 2 + head
            assert not any(
                name.startswith("lora.") and not name.endswith(f".{progress.task}") for name in upload.payload
            )
            assert all(name in run.clients[0].net.state_dict() for name in answer)


def test_the_server_merges_by_what_the_clients_sent(run):
    """Round 1: A by column; then the last round's B through the merged A."""
    (progress, uploads, answers) = run.method.rounds[1]
    assert progress == Progress(0, 1)
    name = "lora.3.down.0"
    weights = torch.stack([upload.payload["gram.3"] for upload in uploads])
    factors = torch.stack([upload.payload[name] for upload in uploads])
    expected = (factors * (weights / weights.sum(0))[:, None]).sum(0)
    torch.testing.assert_close(answers[0][name], expected, rtol=1e-4, atol=1e-5)
    (_, uploads, answers) = run.method.rounds[2]
    down = run.method.rounds[1][2][0][name].double()
    grams = [down * upload.payload["energy.3"].double() @ down.mT for upload in uploads]
    ups = [upload.payload["lora.3.up.0"].double() for upload in uploads]
    explicit = sum(up @ gram for up, gram in zip(ups, grams, strict=True)) @ torch.linalg.inv(sum(grams))
    torch.testing.assert_close(answers[0]["lora.3.up.0"].double(), explicit, rtol=1e-3, atol=1e-5)


def test_grams_are_of_the_inputs_of_the_net_just_trained(run, foundation_config):
    """The last client's last B round, once more by hand."""
    client = run.clients[-1]
    (_, uploads, _) = run.method.rounds[-1]
    state = run.method.turns[-1][3]
    net = run.method.build_net(0, StreamShape(6, 2, 2))
    net.load_state_dict(state)
    rows = []
    layer = net.foundation.linear(0, "attn.proj")
    handle = layer.register_forward_hook(lambda _, inputs, output: rows.append(inputs[0].detach()))
    with torch.no_grad():
        net.eval()(client.data.fetch(client.train_ids).images, None, 1)
    handle.remove()
    expected = torch.cat(rows).flatten(0, 1).square().sum(0)
    torch.testing.assert_close(uploads[-1].payload["energy.1"], expected, rtol=1e-4, atol=1e-4)


def test_tasks_are_merged_by_their_grams(run):
    """delta W = (sum_t B_t A_t G^t) (sum_t G^t)^-1 is what the net adds, exactly low-rank."""
    net = run.clients[0].net
    sums = {}
    for progress, uploads, _ in run.method.rounds:
        if progress.round == 2:
            sums[progress.task] = sum(upload.payload["energy.5"].double() for upload in uploads)
    layer = net.lora[5]
    updates = [(up @ down).detach().double() for up, down in zip(layer.up, layer.down, strict=True)]
    joint = regression_mean(updates, [sums[0], sums[1]])
    down, up, _ = layer.factors()
    torch.testing.assert_close((up @ down).detach().double(), joint, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(layer.share.double(), shares(torch.stack([sums[0], sums[1]])), rtol=1e-4, atol=1e-6)


def test_one_task_predicts_with_its_own_module(run):
    """After the first task the merge is B A itself."""
    (_, _, answers) = run.method.rounds[2]
    for n in range(LAYERS):
        share = answers[0][f"lora.{n}.share"]
        assert torch.equal(share[0], torch.ones_like(share[0])) and not share[1].any()


def test_until_the_server_answers_tasks_count_alike(foundation_config, federate):
    method = LoRM(foundation=foundation_config, **TINY)
    client = federate(method, max_tasks=1).clients[0]
    client.task = 1
    method.begin_task(client)
    for layer in client.net.lora:
        assert torch.equal(layer.share, torch.full_like(layer.share, 0.5))


def head_upload(client, counts, weight, gram):
    payload = {"head.weight": weight, "head.bias": weight[:, 0].clone(), "gram.head": pack_symmetric(gram)}
    return Upload(client=client, task=0, round=0, payload=payload, class_counts=torch.tensor(counts))


@pytest.fixture
def heads():
    """Class 0 is the first client's, 1 the second's, 2 of both, 3 of neither."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 30, generator=generator)
    weights, grams = torch.randn(2, 4, 5, generator=generator), x @ x.mT
    weights[:, 3] = 1.0
    return [head_upload(0, [2, 0, 1, 0], weights[0], grams[0]), head_upload(1, [0, 3, 3, 0], weights[1], grams[1])]


def test_a_private_class_keeps_its_owners_row(heads):
    merged = merge_head(heads, "classwise")["head.weight"]
    rows = [upload.payload["head.weight"] for upload in heads]
    assert torch.equal(merged[0], rows[0][0]) and torch.equal(merged[1], rows[1][1])
    assert torch.equal(merged[3], rows[0][3])
    among_all = merge_head(heads, "average")
    torch.testing.assert_close(merged[2], among_all["head.weight"][2])
    assert not torch.allclose(among_all["head.weight"][0], rows[0][0])


def test_biases_are_averaged_by_samples(heads):
    biases = [upload.payload["head.bias"] for upload in heads]
    classwise, average = (merge_head(heads, kind)["head.bias"] for kind in ("classwise", "average"))
    assert classwise[0] == biases[0][0] and classwise[1] == biases[1][1]
    torch.testing.assert_close(classwise[2], (biases[0][2] + 3 * biases[1][2]) / 4)
    torch.testing.assert_close(average, (3 * biases[0] + 6 * biases[1]) / 9)


@pytest.mark.parametrize("options", [{"alpha_backbone": 0.5}, {"gram_model": "prediction"}, {"blocks": (0, 5)}])
def test_other_configurations_train(foundation_config, federate, options):
    method = LoRM(foundation=foundation_config, **TINY, **options)
    trainer = federate(method, rounds_per_task=2)
    assert all(value.isfinite().all() for value in trainer.clients[0].net.state_dict().values())
    assert trainer.matrix.of("task_il")[:, 0, 0].mean() > 0.5


def test_whole_grams_are_sent_as_triangles_in_rounds_of_down_projections(foundation_config, federate):
    method = Watched(foundation=foundation_config, **TINY, alpha_backbone=0.5, blocks=(0,), targets=("attn.qkv",))
    method.turns, method.rounds = [], []
    trainer = federate(method, rounds_per_task=2, max_tasks=1)
    (_, first, _), (_, second, _) = trainer.method.rounds
    assert first[0].payload["gram.0"].shape == (3,) and first[0].payload["energy.0"].shape == (64,)
    assert second[0].payload["gram.0"].shape == (64 * 65 // 2,) and "energy.0" not in second[0].payload


def test_server_state_is_complete(run, foundation_config):
    fresh = LoRM(foundation=foundation_config, **TINY)
    fresh.load_state_dict(run.method.state_dict())
    (progress, uploads, answers) = run.method.rounds[-1]
    again = fresh.aggregate(uploads, progress)
    assert all(torch.equal(again[0][name], answers[0][name]) for name in answers[0])


def test_it_learns_the_first_task(foundation_config, federate, make_data):
    method = LoRM(foundation=foundation_config, **(TINY | {"local_epochs": 4}))
    trainer = federate(method, make_data(train_per_class=16), rounds_per_task=2, max_tasks=1)
    assert trainer.matrix.of("task_il")[:, 0, 0].mean() > 0.75
