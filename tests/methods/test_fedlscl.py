from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fedlscl.callbacks import Callback
from fedlscl.federated.client import Client
from fedlscl.federated.method import Progress, StreamShape
from fedlscl.federated.payload import Upload
from fedlscl.federated.readout import ReadoutConfig
from fedlscl.functional.analytic import unpack_symmetric
from fedlscl.functional.distillation import Factors, one_by_one_distill, second_moment
from fedlscl.functional.objectives import cross_entropy
from fedlscl.methods import FedLSCL, fedlscl
from fedlscl.methods.fedlscl import draw_per_class, feature_moment, packed_factors, unpacked_factors, updated_buffer
from fedlscl.modules import (
    BIAS_LR,
    GENERATOR_LR,
    HEAD_LR,
    LR,
    CollaborativeModule,
    ConsolidationModule,
    ContinualFineTuningModule,
    DistillationModule,
)

M = 3
RATES = {"generator": GENERATOR_LR, "generator.bias": BIAS_LR, "head": HEAD_LR}


@pytest.fixture(scope="module")
def make_method(collaborator_config):
    """The method on tiny nets."""

    def make(collaborator=None, **options):
        shape = replace(collaborator_config, **(collaborator or {}))
        common = {"local_epochs": 1, "batch_size": 8, "buffer_per_class": M, "upload_rank": "exact"}
        return FedLSCL(collaborator=shape, **(common | options))

    return make


class Watch(Callback):
    """Messages, stages, and copies of what matters at the right moments."""

    def __init__(self, method):
        self.uploads, self.answers, self.stages, self.features = [], [], [], []
        upload, aggregate, stages = method.upload, method.aggregate, method.stages

        def watched_upload(client):
            payload = upload(client)
            ids = updated_buffer(client, method.buffer_per_class).ids
            with torch.no_grad():
                features = client.net.eval().generate(client.data.fetch(ids).images)[0]
            self.features.append(features)
            self.uploads.append(payload)
            return payload

        def watched_aggregate(uploads, progress):
            self.answers.append(aggregate(uploads, progress))
            return self.answers[-1]

        def watched_stages(client):
            for stage in stages(client):
                samples = torch.cat([batch.ids for batch in stage.batches])
                self.stages.append((client, client.task, client.buffer, client.previous, stage, samples))
                yield stage

        method.upload, method.aggregate, method.stages = watched_upload, watched_aggregate, watched_stages


class Sent:
    """Uploads alone."""

    def __init__(self, method):
        self.uploads, upload = [], method.upload
        method.upload = lambda client: self.uploads.append(upload(client)) or self.uploads[-1]


@pytest.fixture(scope="module")
def watched(make_method, federate):
    """Two tasks of two rounds, and what was seen of them."""
    method = make_method()
    watch = Watch(method)
    return federate(method, rounds_per_task=2), watch


def test_uploads_are_generator_and_moments_and_nothing_else(watched):
    trainer, watch = watched
    p, lora_dim = 17, 4 * (64 + 192)
    assert len(watch.uploads) == 8
    for payload in watch.uploads:
        assert {name: tuple(value.shape) for name, value in payload.items()} == {
            "generator": (p, lora_dim),
            "moments": (p * (p + 1) // 2,),
        }
    assert (trainer.run.traffic["up_values"] == p * lora_dim + p * (p + 1) // 2).all()


def test_no_cnn_head_image_or_raw_feature_is_in_an_upload(watched):
    """No value of theirs: a raw feature row, a weight or a pixel would be found again."""
    trainer, watch = watched
    client = trainer.clients[1]
    sent = torch.cat([value.flatten() for value in watch.uploads[-1].values()]).double()
    private = [value for name, value in client.net.state_dict().items() if not name.startswith("generator.")]
    private += [watch.features[-1], client.data.fetch(client.buffer.ids).images.float() / 255]
    for value in private:
        own = value.double().flatten()
        own = own[(own != 0) & (own != 1)]
        assert torch.isin(own, sent).sum() <= 1e-3 * len(own) + 1


def test_moments_are_those_of_the_features_of_the_buffer_to_be(watched):
    _, watch = watched
    for payload, features in zip(watch.uploads, watch.features, strict=True):
        expected = second_moment(features)
        torch.testing.assert_close(unpack_symmetric(payload["moments"], 17).double(), expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(expected.trace().item(), 2.0, rtol=1e-2, atol=0)  # unit-norm features and the 1


def test_answers_are_eq5_and_become_the_clients_generators(watched):
    trainer, watch = watched
    assert len(watch.answers) == 4
    for round_, answers in enumerate(watch.answers):
        payloads = watch.uploads[2 * round_ : 2 * round_ + 2]
        moments = [unpack_symmetric(payload["moments"], 17) for payload in payloads]
        fused = one_by_one_distill([payload["generator"] for payload in payloads], moments, 1.0)
        for answer, expected, payload in zip(answers, fused, payloads, strict=True):
            assert answer.keys() == {"generator"} and torch.equal(answer["generator"], expected)
            assert not torch.equal(expected, payload["generator"])
    for client, answer in zip(trainer.clients, watch.answers[-1], strict=True):
        assert torch.equal(client.net.generator.matrix, answer["generator"])


def test_only_the_generator_comes_back(watched):
    """CNNs, projections and heads stay with their clients."""
    first, second = (client.net.state_dict() for client in watched[0].clients)
    for part in ("small.", "unit.", "head."):
        names = [name for name in first if name.startswith(part) and name.endswith("weight")]
        assert names and not all(torch.equal(first[name], second[name]) for name in names)


def test_the_buffer_holds_the_best_samples_of_every_class(watched):
    trainer, _ = watched
    for client in trainer.clients:
        assert torch.equal(client.buffer.classes, client.seen)
        own = torch.cat([client.data.train_ids(task) for task in range(2)])
        assert torch.isin(client.buffer.ids, own).all() and len(client.buffer.ids.unique()) == len(client.buffer)
        counts = client.data.class_counts(0) + client.data.class_counts(1)
        for label in client.seen:
            assert (client.buffer.labels == label).sum() == min(M, int(counts[label]))
        batch = client.data.fetch(client.train_ids)
        with torch.no_grad():
            losses = cross_entropy(
                client.net.eval()(batch.images).logits, batch.labels, client.classes, reduction="none"
            )
        for label in client.classes:
            kept = torch.isin(batch.ids, client.buffer.ids) & (batch.labels == label)
            dropped = ~kept & (batch.labels == label)
            assert not dropped.any() or losses[kept].max() <= losses[dropped].min() + 1e-6
        assert len(client.train_ids) > len(client.classes) * M


def test_samples_of_earlier_tasks_stay_in_the_buffer(watched):
    trainer, watch = watched
    for client in trainer.clients:
        before = next(buffer for owner, task, buffer, *_ in watch.stages if owner is client and task == 1)
        assert torch.equal(
            client.buffer.ids[torch.isin(client.buffer.ids, before.ids)].sort().values, before.ids.sort().values
        )


def test_stages_are_those_of_algorithm_1(watched):
    trainer, watch = watched
    names = [(client.id, task, stage.name) for client, task, _, _, stage, _ in watch.stages]
    first = [(client, 0, "collaborative") for _ in range(2) for client in range(2)]
    second = [(client, 1, name) for _ in range(2) for client in range(2) for name in ("collaborative", "continual")]
    assert names == first + second
    for client, task, buffer, previous, stage, samples in watch.stages:
        assert stage.epochs == 1 and stage.module.net is client.net
        rates = {
            id(p): group["lr"] for group in stage.module.configure_optimizers().param_groups for p in group["params"]
        }
        assert rates[id(client.net.generator.weight)] == GENERATOR_LR
        assert rates[id(client.net.generator.bias)] == BIAS_LR
        assert rates[id(client.net.head.weight)] == HEAD_LR
        assert rates[id(client.net.unit.project.weight)] == trainer.method.lr == LR
        labels = client.data.data.labels(samples)
        assert stage.module.counts.tolist() == labels.bincount(minlength=6).tolist()
        if stage.name == "collaborative":
            assert type(stage.module) is CollaborativeModule
            assert torch.equal(stage.module.classes, client.data.classes(task))
            assert sorted(samples.tolist()) == sorted(client.data.train_ids(task).tolist())
            assert stage.module.freeze_norm
        else:
            assert type(stage.module) is ContinualFineTuningModule and stage.module.freeze_norm
            assert stage.module.previous.net is previous
            assert torch.equal(stage.module.classes, client.data.seen(1))
            assert torch.equal(stage.module.old_classes, client.data.seen(0))
            current = samples[~torch.isin(samples, buffer.ids)]
            assert torch.isin(buffer.ids, samples).all() and torch.isin(current, client.data.train_ids(1)).all()
            labels = client.data.data.labels(current)
            counts = client.data.class_counts(1)
            assert all((labels == label).sum() == min(M, int(counts[label])) for label in client.data.classes(1))


def test_the_predecessor_is_the_net_after_the_last_aggregation(watched):
    trainer, watch = watched
    for client in trainer.clients:
        assert torch.equal(client.previous.generator.matrix, client.net.generator.matrix)
        before = next(previous for owner, task, _, previous, *_ in watch.stages if owner is client and task == 1)
        assert torch.equal(before.generator.matrix, watch.answers[1][client.id]["generator"])


def test_new_classes_begin_with_the_direction_of_their_mean(make_method, federate):
    class Start(Callback):
        def on_task_start(self, trainer):
            for client in trainer.clients:
                batch = client.data.fetch(client.train_ids)
                with torch.no_grad():
                    tokens = torch.nn.functional.normalize(client.net.eval()(batch.images).tokens)
                for label in client.classes:
                    mean = torch.nn.functional.normalize(tokens[batch.labels == label].mean(0), dim=0)
                    torch.testing.assert_close(client.net.head.weight[label], mean, rtol=1e-3, atol=1e-4)
            self.rows = trainer.clients[0].net.head.weight.detach().clone()

    on, off = Start(), Callback()
    federate(make_method(), callbacks=[on], max_tasks=1)
    assert on.rows.norm(dim=1).sub(1).abs().lt(1e-5).sum() == 2

    class Untouched(Callback):
        def on_task_start(self, trainer):
            assert not trainer.clients[0].net.head.weight.norm(dim=1).sub(1).abs().lt(1e-5).any()

    federate(make_method(imprint=False), callbacks=[Untouched(), off], max_tasks=1)


def test_consistency_of_the_first_step_is_zero_where_stage_one_made_no_step(make_method, federate):
    """The predecessor is the net after aggregation, so at the start of a task nothing has to be kept."""
    method = make_method(lr=1e-30, generator_lr=1e-30, bias_lr=1e-30)
    trainer = federate(method)
    terms = [entry["terms"] for entry in trainer.run.history if entry["stage"] == "continual"]
    assert len(terms) == 2
    assert all(term["features"] == 0.0 and term["lora"] == 0.0 for term in terms)


def test_without_a_buffer_moments_are_of_the_tasks_samples(make_method, federate):
    method = make_method(buffer_per_class=0)
    watch = Sent(method)
    trainer = federate(method, max_tasks=1, rounds_per_task=1)
    assert len(watch.uploads) == 2 and all(len(client.buffer) == 0 for client in trainer.clients)
    for payload in watch.uploads:
        moment = unpack_symmetric(payload["moments"], 17)
        assert torch.linalg.matrix_rank(moment) > 1 and moment[-1, -1] == 1


def test_a_client_without_data_has_nothing_to_teach(make_method):
    net = make_method().build_net(0, StreamShape(4))
    client = SimpleNamespace(net=net, train_ids=torch.tensor([], dtype=torch.long))
    moment = feature_moment(client, client.train_ids)
    assert moment.shape == (17, 17) and not moment.any()


def test_without_distillation_clients_keep_their_generators(make_method, federate):
    trainer = federate(make_method(distill=False))
    assert all(not values.any() for values in trainer.run.traffic.values())
    for mask in ("task_il", "class_il"):
        before, after = trainer.matrix.of(mask, "before"), trainer.matrix.of(mask, "after")
        assert torch.equal(before.nan_to_num(-1), after.nan_to_num(-1))


@pytest.mark.parametrize(
    ("continual", "expected"),
    [
        ("none", {0: [CollaborativeModule], 1: [CollaborativeModule]}),
        ("ewc", {0: [CollaborativeModule], 1: [ConsolidationModule]}),
        ("lwf", {0: [CollaborativeModule], 1: [DistillationModule]}),
        ("replay", {0: [CollaborativeModule], 1: [CollaborativeModule, ContinualFineTuningModule]}),
    ],
)
def test_stage_two_can_be_left_out_or_replaced(make_method, federate, continual, expected):
    method = make_method(continual=continual)
    watch = Watch(method)
    federate(method)
    for task, modules in expected.items():
        found = [type(stage.module) for client, n, _, _, stage, _ in watch.stages if n == task and client.id == 0]
        assert found == modules
        for _, n, _, _, stage, _ in watch.stages:
            assert n == 0 or stage.module.lr_of == RATES
            assert n == 0 or stage.module.freeze_norm


@pytest.mark.parametrize("continual", ["replay", "ewc", "lwf", "none"])
def test_it_runs_without_collaboration(make_method, federate, continual):
    trainer = federate(make_method({"collaboration": False}, continual=continual))
    assert all(not values.any() for values in trainer.run.traffic.values())
    assert {name for name, _ in trainer.clients[0].net.named_parameters()} == {"head.weight"}


@pytest.mark.parametrize(
    ("collaborator", "options"),
    [
        ({"head": "linear"}, {"imprint": False, "replay_current": False, "balance": False}),
        ({}, {"continual": "ewc", "shared_initialisation": False}),
        ({"head": "linear", "targets": ("attn.proj", "mlp.fc1"), "blocks": (5, 0), "rank": 1}, {}),
        ({}, {"buffer_per_class": 1, "replay_current": False}),
        ({"unit_features": False, "generator_start": "per_image"}, {}),
    ],
    ids=["paper", "ewc", "other-targets", "one-sample-per-class", "raw"],
)
def test_variants_run(make_method, federate, collaborator, options):
    trainer = federate(make_method(collaborator, **options))
    values = trainer.matrix.of("class_il")[:, [0, 1, 1], [0, 0, 1]]
    assert ((values >= 0) & (values <= 1)).all()
    assert all(value.isfinite().all() for client in trainer.clients for value in client.net.state_dict().values())


def test_the_papers_stage_two_replays_the_buffer_alone(make_method, federate):
    method = make_method(replay_current=False)
    watch = Watch(method)
    federate(method)
    for _, _, buffer, _, stage, samples in watch.stages:
        if stage.name == "continual":
            assert sorted(samples.tolist()) == sorted(buffer.ids.tolist())


def test_clients_with_other_small_models_meet_in_one_generator_space(make_method, make_data, federate):
    method = make_method(small_models=("test_resnet", "test_byobnet"))
    watch = Watch(method)
    trainer = federate(method, make_data(num_clients=3, fake_classes=8), max_tasks=1)
    assert [c.net.config.small_model for c in trainer.clients] == ["test_resnet", "test_byobnet", "test_resnet"]
    assert trainer.clients[0].net.small.width != trainer.clients[1].net.small.width
    assert len({tuple(value.shape for value in payload.values()) for payload in watch.uploads}) == 1
    assert all(answer["generator"].isfinite().all() for answers in watch.answers for answer in answers)


@pytest.mark.parametrize("shared", [True, False])
def test_clients_start_alike_if_so_asked(make_method, federate, shared):
    class Start(Callback):
        def on_fit_start(self, trainer):
            first, second = (client.net.state_dict() for client in trainer.clients)
            self.equal = [torch.equal(first[name], second[name]) for name in first if name.endswith("conv1.0.weight")]

    start = Start()
    federate(make_method(shared_initialisation=shared), callbacks=[start], max_tasks=1)
    assert start.equal == [shared]


@pytest.mark.parametrize("at_rest", [True, False])
def test_batch_norm_rests_from_the_start_or_from_the_second_task(make_method, federate, at_rest):
    method = make_method(freeze_norm=at_rest)
    watch = Watch(method)
    federate(method)
    modes = [stage.module.freeze_norm for _, _, _, _, stage, _ in watch.stages if stage.name == "collaborative"]
    assert modes == [at_rest] * 2 + [True] * 2


def test_permuting_clients_permutes_answers(watched):
    trainer, _ = watched
    trainer.run.progress = type(trainer.run.progress)(1, 1)
    uploads = [trainer.pool.runner.upload(client) for client in trainer.clients]
    plain = trainer.method.aggregate(uploads, trainer.run.progress)
    swapped = trainer.method.aggregate(uploads[::-1], trainer.run.progress)
    for left, right in zip(plain, swapped[::-1], strict=True):
        torch.testing.assert_close(left["generator"], right["generator"], rtol=1e-5, atol=1e-7)


def test_drawn_samples_are_of_the_current_task_and_balanced(watched):
    client = watched[0].clients[0]
    ids = draw_per_class(client, 2)
    assert len(ids.unique()) == len(ids) == 4 and torch.isin(ids, client.train_ids).all()
    assert client.data.data.labels(ids).bincount(minlength=6)[client.classes].tolist() == [2, 2]
    torch.manual_seed(1)
    first = draw_per_class(client, 2)
    torch.manual_seed(2)
    assert not torch.equal(first, draw_per_class(client, 2))


def test_a_triangle_becomes_the_matrix_it_was_taken_from():
    half = torch.randn(5, 5)
    matrix = half + half.T
    rows, columns = torch.triu_indices(5, 5)
    assert torch.equal(unpack_symmetric(matrix[rows, columns], 5), matrix)


def test_the_predecessors_features_are_computed_once_a_task_and_the_run_stays_the_same(
    make_method, federate, monkeypatch
):
    """The literal path computes them at every step of Stage 2; only rounding differs."""
    fast = federate(make_method(), rounds_per_task=2)
    monkeypatch.setattr(
        ContinualFineTuningModule,
        "_predecessor",
        torch.no_grad()(lambda module, batch: module.previous.net.generate(batch.images)),
    )
    literal = federate(make_method(), rounds_per_task=2)
    for one, other in zip(fast.clients, literal.clients, strict=True):
        for name, value in one.net.state_dict().items():
            torch.testing.assert_close(value, other.net.state_dict()[name], rtol=1e-3, atol=1e-4)
        expected = one.previous.embed(one.data.fetch(one.buffer.ids).images)
        assert len(expected) == len(one.buffer) > 0
        torch.testing.assert_close(one.memory[fedlscl.KEPT], expected)


def test_without_a_small_model_a_static_lora_is_fused(make_method, federate):
    """W = b for every image; Eq. 5 with C = [1] is a weighted mean of the clients' b."""
    trainer = federate(make_method({"small_model": "none"}), rounds_per_task=2)
    net = trainer.clients[0].net
    images = trainer.clients[0].data.fetch(trainer.clients[0].train_ids[:3]).images
    features, lora = net.generate(images)
    assert features.shape == (3, 0) and torch.equal(lora, net.generator.bias.expand(3, -1))
    assert net.generator.matrix.shape[0] == 1 and not hasattr(net, "small")
    up = trainer.run.traffic["up_values"][0, 0, 0]
    assert up == net.generator.matrix.shape[1] + 1
    fused = one_by_one_distill([torch.tensor([[0.0]]), torch.tensor([[1.0]])], [torch.ones(1, 1).double()] * 2, 1.0)
    assert [round(float(value), 6) for value in fused] == [0.5, 0.5]


@pytest.mark.parametrize("frozen", [False, True])
def test_a_frozen_cnn_stays_as_it_is(make_method, federate, frozen):
    method = make_method({"freeze_small": frozen, "feature_dim": 24})
    trainer = federate(method, max_tasks=1)
    torch.manual_seed(0)
    client = trainer.clients[0]
    start = trainer.pool.runner.build(0, trainer.run.validator.stream)
    same = all(torch.equal(a, b) for a, b in zip(start.small.state_dict().values(),
                                                client.net.small.state_dict().values(), strict=True))  # fmt: skip
    assert same == frozen
    assert not torch.equal(start.unit.project.weight, client.net.unit.project.weight)


def test_calibrated_norms_have_the_statistics_of_the_first_task(make_method, federate):
    """Means over the batches, once; weights and later statistics are not touched by it."""
    trainer = federate(make_method({"freeze_small": True}, calibrate_norm=True), rounds_per_task=2)
    client = trainer.clients[0]
    fresh = trainer.pool.runner.build(0, trainer.run.validator.stream).small.train()
    first = next(part for part in fresh.modules() if isinstance(part, torch.nn.BatchNorm2d))
    seen = []
    first.register_forward_pre_hook(lambda norm, inputs: seen.append(inputs[0]))
    fresh(client.data.fetch(client.data.train_ids(0)).images)
    norm = next(part for part in client.net.small.modules() if isinstance(part, torch.nn.BatchNorm2d))
    torch.testing.assert_close(norm.running_mean, seen[0].mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert norm.momentum == 0.1


def test_a_constant_small_model_is_reported(make_method, federate, caplog):
    constant = make_method({"feature_dim": 16})
    build = constant.build_net

    def dead(client, stream):
        net = build(client, stream)
        torch.nn.init.zeros_(net.unit.project.weight)
        return net

    federate(constant, max_tasks=1)
    alive = [record.getMessage() for record in caplog.records if "works as a constant" in record.getMessage()]
    caplog.clear()
    constant.build_net = dead
    federate(constant, max_tasks=1)
    dead_lines = [record.getMessage() for record in caplog.records if "works as a constant" in record.getMessage()]
    assert len(dead_lines) == 2 >= len(alive) and "client 1: the small model's features E differ by" in dead_lines[1]


@pytest.mark.parametrize(("replay_current", "columns"), [(True, [0, 1]), (False, [0])])
def test_a_buffer_alone_is_replayed_over_old_columns(make_method, federate, replay_current, columns):
    method = make_method({}, replay_current=replay_current)
    watch = []
    stages = method.stages

    def watched(client):
        for stage in stages(client):
            if stage.name == "continual":
                watch.append((stage.module.classes, client.data))
            yield stage

    method.stages = watched
    federate(method)
    for classes, data in watch:
        assert torch.equal(classes, torch.cat([data.classes(task) for task in columns]).unique())


def test_kept_features_are_used_if_the_buffer_has_all_old_samples():
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    data = SimpleNamespace(data=SimpleNamespace(labels=lambda ids: labels[ids]))
    client = SimpleNamespace(data=data, old=torch.tensor([0, 1]), memory={fedlscl.KEPT: torch.rand(2, 3)})
    client.buffer = SimpleNamespace(ids=torch.tensor([3, 0]))
    ids, features = fedlscl.kept_features(client, torch.tensor([0, 3, 4, 5]))
    assert ids is client.buffer.ids and features is client.memory[fedlscl.KEPT]
    assert fedlscl.kept_features(client, torch.tensor([0, 3, 2])) is None
    client.memory.clear()
    assert fedlscl.kept_features(client, torch.tensor([0, 3])) is None


@pytest.mark.parametrize("rank", [17, 0.999999999])
def test_factors_of_full_rank_train_as_the_exact_terms(make_method, federate, rank):
    """Up to rounding to float32 on the way; every client solves Eq. 5 by itself."""
    exact = federate(make_method({}), rounds_per_task=2, max_tasks=1)
    factors = federate(make_method({}, upload_rank=rank), rounds_per_task=2, max_tasks=1)
    for one, two in zip(exact.clients, factors.clients, strict=True):
        torch.testing.assert_close(two.net.generator.matrix, one.net.generator.matrix, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2), ("float16", 2)])
def test_factors_have_their_rank_and_dtype(make_method, federate, dtype, size):
    trainer = federate(make_method({}, upload_rank=3, upload_dtype=dtype))
    p, m = trainer.clients[0].net.generator.matrix.shape
    assert (trainer.run.traffic["up_values"] == 3 * (p + m) + 3).all()
    assert (trainer.run.traffic["down_values"] == 3 * (p + m) + 3).all()
    assert (trainer.run.traffic["up"] < size * 3 * (p + m) + 700).all()


def test_by_default_four_directions_are_sent_and_with_masks_all(make_method, federate):
    net = federate(make_method({}, upload_rank="auto"), max_tasks=1).clients[0].net
    for options, rank in (({}, 4), ({"secure_sum": True}, None), ({"noise_multiplier": 1.0}, None)):
        assert make_method({}, upload_rank="auto", **options)._rank(net) == rank


@pytest.mark.parametrize("clients", [2, 5, 6])
def test_an_answer_joins_the_other_clients_up_to_four_times_their_rank(make_method, clients):
    """With up to five clients it is what all others have sent, to the precision of a float32."""
    random = torch.Generator().manual_seed(clients)
    phis = [torch.randn(9, 5, generator=random) for _ in range(clients)]
    parts = [Factors.of(phi, second_moment(torch.randn(4, 8, generator=random)), 1) for phi in phis]
    uploads = [
        Upload(client=i, task=0, round=0, payload=packed_factors(part, "float32"), class_counts=torch.ones(3).long())
        for i, part in enumerate(parts)
    ]
    answers = make_method({}, upload_rank=1).aggregate(uploads, Progress(0, 0))
    for i, (phi, answer) in enumerate(zip(phis, answers, strict=True)):
        assert answer["factor"].shape[1] == min(clients - 1, 4)
        found = unpacked_factors(answer).solve(phi, 1.0)
        whole = Factors.merged([part for j, part in enumerate(parts) if j != i], clients).solve(phi, 1.0)
        assert torch.allclose(found, whole, rtol=1e-4, atol=1e-5) == (clients <= 5)


def spoilt_factors(name, change):
    def spoil(payload):
        return {**payload, name: change(payload[name])}

    return spoil


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (spoilt_factors("factor_scale", lambda x: 9 * x), "factors are larger than the trace of their moments"),
        (spoilt_factors("trace", lambda x: x + 5), "moments are larger than those of unit features"),
        (spoilt_factors("factor", lambda x: x[:, :1].expand(-1, 3).clone() / 2), "factors are not orthogonal"),
        (spoilt_factors("factor", lambda x: x[:, :2].clone()), "factors must have rank 3, got 2"),
        (spoilt_factors("projected", lambda x: x[:, 1:].clone()), "'projected' has shape"),
    ],
)
def test_impossible_factors_are_rejected(make_method, federate, spoil, reason):
    trainer = federate(make_method({}, upload_rank=3), max_tasks=1)
    client = trainer.clients[0]
    upload = trainer.pool.runner.upload(client)
    before = len(trainer.run.validator.rejected)
    assert trainer.run.validator.filter([replace(upload, payload=spoil(upload.payload))], Progress(0, 0)) == []
    assert reason in trainer.run.validator.rejected[before].reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(
            ({"upload_rank": rank}, f"upload_rank must be .*>= 1 or in \\(0, 1\\) or one of exact, auto, got {rank!r}")
            for rank in (0, -1, "half", 0.0, 1.0, 4.5, float("nan"))
        ),
        (
            {"upload_rank": 4, "secure_sum": True},
            "upload_rank must be exact with secure_sum: factors do not add up, got 4",
        ),
        ({"upload_rank": 0.9, "noise_multiplier": 1.0}, "upload_rank must be exact with noise"),
        ({"upload_dtype": "int8"}, "upload_dtype must be one of float32, bfloat16, float16, got 'int8'"),
    ],
)
def test_combinations_that_factors_do_not_allow_are_refused(make_method, options, message):
    with pytest.raises(ValueError, match=message):
        make_method({}, **options)


@pytest.mark.parametrize("upload", [{"upload_rank": "auto"}, {"upload_rank": 0.9}, {"upload_dtype": "float16"}])
def test_clients_without_samples_do_not_decide_what_a_usual_norm_is(make_method, federate, make_data, upload):
    """Two of three clients have no sample of the first task: their factors are zero."""
    options = {"protocol": "global", "private_classes": 0, "public_classes": 4, "num_clients": 3, "train_per_class": 6}
    data = make_data(**options, dirichlet_alpha=0.02)
    empty = [len(data.stream(client).train_ids(0)) == 0 for client in range(3)]
    assert sum(empty) == 2
    trainer = federate(make_method(**({"upload_rank": 4} | upload)), data, rounds_per_task=2)
    free = federate(make_method(**({"upload_rank": 4} | upload)), data, rounds_per_task=2, max_norm_ratio=0)
    assert trainer.run.validator.rejected == [] and (trainer.run.traffic["down"][:, :, 0] > 0).all()
    for one, other in zip(trainer.clients, free.clients, strict=True):
        assert all(map(torch.equal, one.net.state_dict().values(), other.net.state_dict().values()))


@pytest.mark.parametrize("first", [0, 1])
def test_norms_are_calibrated_in_the_first_task_that_has_two_images(make_method, make_data, engine, first):
    method, data = make_method({"freeze_small": True}, calibrate_norm=True), make_data()
    stream = data.stream(0)
    few = (stream.train_ids(0).numpy()[:first], stream.train_ids(1).numpy())
    net = method.build_net(0, StreamShape(6, 2, 2))
    client = Client(id=0, net=net, data=replace(stream, split=replace(stream.split, train=few)), engine=engine)
    norm = next(part for part in client.net.small.modules() if isinstance(part, torch.nn.BatchNorm2d))
    norm.running_mean.fill_(7.0)
    means = []
    for task in (0, 1):
        client.task = task
        method.begin_task(client)
        means.append(norm.running_mean.clone())
    assert (means[0] == 7).all() and not (means[1] == 7).any()


def test_clients_that_fuse_generators_all_have_a_cnn_or_none_has(make_method):
    with pytest.raises(ValueError, match=r"small_models must all be CNNs, or all 'none'.*got none, test_resnet"):
        make_method(small_models=["none", "test_resnet"])
    assert make_method(small_models=["none", "test_resnet"], distill=False)


@pytest.mark.parametrize("options", [{"small_models": ["test_resnet", "resnet10t"]}, {"shared_initialisation": False}])
def test_features_of_different_small_models_are_not_added_up(make_method, federate, options):
    readouts = ReadoutConfig(heads=["ncm"], features=["adapted", "frozen+small"])
    with pytest.raises(
        ValueError, match=r"readouts.features must leave out small models that differ.*got frozen\+small"
    ):
        federate(make_method(**options), readouts=readouts)
    federate(make_method(**options), readouts=replace(readouts, features=["adapted"]), max_tasks=1)


def test_a_rank_of_true_is_refused(make_method):
    with pytest.raises(ValueError, match=r"upload_rank must be .*>= 1 or .* or one of exact, auto, got True"):
        make_method(upload_rank=True)
