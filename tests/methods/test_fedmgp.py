import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlscl.federated.method import Progress, StreamShape
from fedlscl.federated.payload import Upload
from fedlscl.federated.trainer import FederatedTrainer
from fedlscl.flower.federation import Federation
from fedlscl.methods.prompts import FedMGP, FusionModule, PromptingModule
from fedlscl.nets.vit import FoundationConfig

TINY = {"length": 3, "fine_length": 2, "hidden": 8, "local_epochs": 2, "batch_size": 8}


@pytest.fixture
def make(foundation_config):
    return lambda **changed: FedMGP(**({"foundation": foundation_config} | TINY | changed))


@pytest.fixture(scope="module")
def first_task_net(foundation_config):
    """A client's net at the start of its first task, of classes 0 and 1."""
    torch.manual_seed(0)
    net = FedMGP(foundation=foundation_config, **TINY).build_net(0, StreamShape(6, 2, 2))
    net.task_of_class[torch.tensor([0, 1])] = 0
    return net


def copied(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


def moved(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.fixture
def phases(make, federate):
    """The first client's states before local work, after phase 1 and after phase 2, in every round."""
    method, states = make(), []
    stages = method.stages

    def watched(client):
        for stage in stages(client):
            states.append((client.id, client.task, copied(client.net)))
            yield stage
        states.append((client.id, client.task, copied(client.net)))

    method.stages = watched
    trainer = federate(method, rounds_per_task=2)
    assert len(states) == 2 * 2 * 2 * 3
    return trainer, states


def test_phase_one_moves_the_coarse_part_and_phase_two_the_fine_one(phases):
    _, states = phases
    for (_, task, before), (_, _, between), (_, _, after) in zip(*[iter(states)] * 3, strict=True):
        first, second = moved(before, between), moved(between, after)
        assert {"coarse.pool.prompts", "coarse.head.weight", "coarse.hidden.0.weight"} <= first
        assert all(name.startswith("coarse.") for name in first)
        assert {"fine.prompts", "fine_keys", f"fine_heads.{task}.0.weight", f"fine_heads.{task}.2.weight"} <= second
        assert not any(name.startswith("coarse.") for name in second)
        assert not any(name.startswith(f"fine_heads.{1 - task}.") for name in second)


def test_phase_two_moves_only_what_belongs_to_the_tasks_classes(phases):
    trainer, states = phases
    for (client, task, _), (_, _, between), (_, _, after) in zip(*[iter(states)] * 3, strict=True):
        classes = trainer.clients[client].data.classes(task).tolist()
        expected = [label in classes for label in range(6)]
        keys = (between["fine_keys"] != after["fine_keys"]).any(1)
        prompts = (between["fine.prompts"] != after["fine.prompts"]).transpose(0, 2).flatten(1).any(1)
        head = f"fine_heads.{task}.2.weight"
        assert keys.tolist() == expected
        assert not (prompts & ~torch.tensor(expected)).any() and prompts.any()
        assert (between[head] != after[head]).any(1).tolist() == expected


@pytest.mark.parametrize(("prefix_of", "leaks"), [("nearest", False), ("another", False), ("label", True)])
def test_the_fine_head_cannot_read_the_label_off_the_prefix(first_task_net, data, prefix_of, leaks):
    """Of two images that are equal pixel by pixel but have different labels, the outputs are equal without the leak."""
    net = first_task_net
    image = data.fetch(torch.arange(1))
    batch = image._replace(images=image.images.repeat(2, 1, 1, 1), labels=torch.tensor([0, 1]))
    module = PromptingModule(net, 0.1, torch.tensor([0, 1]), torch.arange(6), prefix_of)
    seen = []
    handle = net.register_forward_hook(lambda net, inputs, output: seen.append((output.logits, output.chosen)))
    for labels in ([0, 1], [1, 0], [0, 0]):
        module.train()
        module.loss(batch._replace(labels=torch.tensor(labels)))
    handle.remove()
    if prefix_of == "nearest":
        assert all(torch.equal(logits, seen[0][0]) and torch.equal(slots, seen[0][1]) for logits, slots in seen)
    if prefix_of == "another":
        assert seen[0][1].flatten().tolist() == [1, 0]  # that of the other image
    if leaks:
        assert seen[0][1].flatten().tolist() == [0, 1] and not torch.equal(*seen[0][0])


@given(labels=st.lists(st.integers(0, 1), min_size=4, max_size=4))
def test_fine_training_uses_what_is_known_at_test_time(first_task_net, data, labels):
    """In the first task, the logits in training are those of evaluation bit for bit, whatever the labels are."""
    module = PromptingModule(first_task_net, 0.1, torch.tensor([0, 1]), torch.arange(6), "nearest")
    batch = data.fetch(torch.arange(4))._replace(labels=torch.tensor(labels))
    outputs = []
    handle = first_task_net.register_forward_hook(lambda net, inputs, output: outputs.append(output))
    module.train().loss(batch)
    first_task_net.eval()(batch.images)
    handle.remove()
    trained, tested = outputs
    assert torch.equal(trained.logits, tested.logits) and torch.equal(trained.chosen, tested.chosen)


def test_an_unknown_rule_is_refused(make):
    with pytest.raises(ValueError, match="prefix_of must be one of nearest, another, label, got 'own'"):
        make(prefix_of="own")


def test_nothing_fine_is_ever_in_a_message(make, federate):
    trainer = federate(make())
    client = trainer.clients[0]
    payload = trainer.method.upload(client)
    hidden = {"hidden.0.weight", "hidden.0.bias"}
    assert set(payload) == {"pool.prompts", "pool.keys", "head.weight", "head.bias"} | hidden
    width, classes, units = 64, 6, 8
    expected = 3 * width + width + width * units + units + units * classes + classes
    assert trainer.run.traffic["up_values"][0, 0, 0] == trainer.run.traffic["down_values"][0, 0, 0] == expected
    fine = [value for name, value in client.net.state_dict().items() if not name.startswith("coarse.")]
    for sent in payload.values():
        assert not any(sent.shape == value.shape and torch.equal(sent, value) for value in fine)


def test_the_cards_sizes():
    """P_g with its key, and h_g, at width 768: 12,288 and, for 100 classes, 445,028 numbers."""
    assert 15 * 768 + 768 == 12_288
    assert 768 * 512 + 512 + 513 * 100 == 393_728 + 513 * 100 + 0 == 445_028


def upload(client, payload, counts):
    return Upload(client=client, task=0, round=0, payload=payload, class_counts=torch.tensor(counts))


def test_one_client_gets_back_what_it_sent_and_equal_ones_what_they_agree_on(make):
    method = make()
    payload = {name: p.detach() for name, p in method.build_net(0, StreamShape(6, 2, 2)).coarse.state_dict().items()}
    for uploads in (
        [upload(0, payload, [1, 2, 0, 0, 0, 0])],
        [upload(i, payload, [1, 2, 0, 0, i, 0]) for i in range(5)],
    ):
        for answer in method.aggregate(uploads, Progress(0, 0)):
            assert answer.keys() == payload.keys()
            assert all(torch.equal(answer[name], payload[name]) for name in payload)


def test_a_download_changes_the_coarse_part_only(make):
    method = make()
    torch.manual_seed(0)
    net, other = method.build_net(0, StreamShape(6, 2, 2)), method.build_net(1, StreamShape(6, 2, 2))
    before, client = copied(net), type("Client", (), {"net": net})
    method.download(client, {name: p.detach() for name, p in other.coarse.state_dict().items()})
    assert moved(before, copied(net)) == {name for name in before if name.startswith("coarse.")}


def test_clients_share_the_coarse_part_but_no_module(phases):
    trainer, _ = phases
    first, second = (client.net for client in trainer.clients)
    assert moved(copied(first.coarse), copied(second.coarse)) == set()
    assert {"fine.prompts", "fine_keys", "task_of_class"} <= moved(copied(first), copied(second))
    pointers = [{p.data_ptr() for p in net.parameters()} for net in (first, second)]
    assert not pointers[0] & pointers[1]


def test_every_class_is_given_the_head_of_its_task(phases):
    trainer, _ = phases
    for client in trainer.clients:
        for task in (0, 1):
            assert (client.net.task_of_class[client.data.classes(task)] == task).all()
        assert (client.net.task_of_class >= 0).sum() == len(client.seen)


def test_keys_have_a_rate_of_their_own_and_classes_their_prefix(make, federate):
    trainer = federate(make(key_lr=0.5, lr=0.25))
    coarse, fine = trainer.method.stages(trainer.clients[0])
    assert coarse.module.net is trainer.clients[0].net.coarse and coarse.module.slot_of_class is None
    assert fine.module.slot_of_class.tolist() == list(range(6))
    groups = fine.module.configure_optimizers().param_groups
    assert [len(group["params"]) for group in groups if group["lr"] == 0.5] == [1]


def test_the_first_task_is_learned_better_than_by_chance(make, federate):
    """On the packaged ViT: the prefixes of a random one say more about themselves than about the image."""
    packaged = FoundationConfig(name="vit_glyph_patch4_32", weights="bundled")
    trainer = federate(make(foundation=packaged, fine_blocks=(10,), lr=0.003), rounds_per_task=2, max_tasks=1)
    assert trainer.matrix.of("task_il")[:, 0, 0].mean() > 0.7


def test_two_runs_are_the_same_to_the_bit(make, federate, same):
    assert same(federate(make()), federate(make()))


def test_bf16_runs(make, federate):
    trainer = federate(make(), precision="bf16-mixed")
    assert all(p.isfinite().all() for client in trainer.clients for p in client.net.parameters())


@pytest.fixture
def distilled(make, make_data, federate):
    """Fits with the fusion by distillation."""

    def run(**options):
        data = make_data(validation_per_class=2)
        return federate(make(fusion="distill", **options), data), data

    return run


def coarse_nets(method, count):
    torch.manual_seed(1)
    return [method.build_net(0, StreamShape(6, 2, 2)).coarse for _ in range(count)]


def test_the_distance_is_that_of_all_tokens_to_every_client(make, data):
    """Beside a literal loop over clients, images, tokens and dimensions."""
    student, *clients = coarse_nets(make(), 3)
    batch = data.fetch(torch.arange(3))
    module = FusionModule(student, clients, lr=0.1, max_norm=1.0)
    expected = 0.0
    for client in clients:
        for image in range(3):
            pair = [net.tokens(batch.images[image : image + 1])[0].double() for net in (student, client)]
            assert len(pair[0]) == student.frozen_prefix(batch.images, 0).shape[1] + 3
            expected += ((pair[0] - pair[1]) ** 2).sum().item() / 3
    assert module.loss(batch)["fusion"].item() == pytest.approx(expected, rel=1e-4)


def test_equal_clients_are_a_fixed_point_of_the_fusion(make, data):
    method = make(fusion="distill")
    (net,) = coarse_nets(method, 1)
    sent = {name: value.clone() for name, value in net.state_dict().items()}
    method.use_public_images(lambda *_: [data.fetch(torch.arange(4))])
    stages = method.server_stages([upload(i, sent, [1, 1, 0, 0, 0, 0]) for i in range(2)], Progress(0, 0))
    module = next(stages).module.train()
    loss = module.loss(data.fetch(torch.arange(4)))["fusion"]
    loss.backward()
    assert loss.item() == 0 and not module.net.pool.prompts.grad.any()
    assert torch.equal(module.net.pool.prompts, net.pool.prompts)


def test_the_fusion_moves_the_prompts_and_then_the_head(make, data):
    method, images = make(fusion="distill"), data.fetch(torch.arange(4))
    method.use_public_images(lambda *_: [images])
    nets = coarse_nets(method, 2)
    uploads = [upload(i, dict(net.state_dict()), [1, 1, 0, 0, 0, 0]) for i, net in enumerate(nets)]
    states = []
    for stage in method.server_stages(uploads, Progress(0, 0)):
        optimizer, module = stage.module.configure_optimizers(), stage.module.train()
        states.append(copied(module.net))
        before = module.loss(images)
        torch.stack(list(before.values())).sum().backward()
        optimizer.step()
        states.append(copied(module.net))
    assert moved(states[0], states[1]) == {"pool.prompts"}
    assert moved(states[2], states[3]) == {"hidden.0.weight", "hidden.0.bias", "head.weight", "head.bias"}
    rows = (states[2]["head.weight"] != states[3]["head.weight"]).any(1)
    assert rows.tolist() == [True, True, False, False, False, False]  # the classes of the uploads
    assert all(not moved(states[3], answer) for answer in method.aggregate(uploads, Progress(0, 0)))
    assert moved(states[3], method.aggregate(uploads, Progress(0, 1))[0])  # nothing of it is left


def test_the_server_sees_held_out_images_of_the_rounds_classes_only(distilled, monkeypatch):
    seen = []
    loss = FusionModule.loss
    monkeypatch.setattr(FusionModule, "loss", lambda self, batch: (seen.append(batch), loss(self, batch))[1])
    trainer, data = distilled(surrogate_per_class=1)
    held = data.stream(0).held_out
    assert seen and all(torch.isin(batch.ids, held).all() for batch in seen)
    assert not torch.isin(
        torch.cat([batch.ids for batch in seen]),
        torch.cat([s.train_ids(t) for s in map(data.stream, (0, 1)) for t in (0, 1)]),
    ).any()
    first = torch.cat([batch.labels for batch in seen if len(batch.labels)][:1])
    known = torch.cat([data.stream(client).classes(0) for client in (0, 1)])
    assert torch.isin(first, known).all()
    entries = [entry["stage"] for entry in trainer.run.history if entry["client"] == -1]
    assert entries == ["fusion", "head"] * 2


def test_runs_with_the_fusion_are_the_same_to_the_bit_and_differ_from_averages(
    distilled, make, make_data, federate, same
):
    once = distilled()[0]
    assert same(once, distilled()[0])
    assert not same(once, federate(make(), make_data(validation_per_class=2)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "validation_per_class must be >= 1 for FedMGP with these options"),
        ({"validation_per_class": 2, "evaluate_on": "validation"}, "evaluate_on must be 'test' for FedMGP"),
    ],
)
def test_a_server_without_images_or_with_those_of_the_evaluation_is_refused(
    make, make_data, federate, options, message
):
    with pytest.raises(ValueError, match=message):
        federate(make(fusion="distill"), make_data(**options))


def test_a_server_without_data_is_refused(make, make_data):
    with pytest.raises(ValueError, match="FedMGP with these options must run in a simulation"):
        Federation(make(fusion="distill"), make_data(validation_per_class=2), FederatedTrainer(), 42, "")


@pytest.mark.parametrize(("option", "value"), [("fusion", "median"), ("surrogate_per_class", 0)])
def test_impossible_options_of_the_fusion_are_refused(make, option, value):
    with pytest.raises(ValueError, match=f"{option} must be .*, got {value!r}"):
        make(**{option: value})
