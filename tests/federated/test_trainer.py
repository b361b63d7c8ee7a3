import pytest
import torch

from fedlscl.callbacks import Callback
from fedlscl.callbacks.formatting import introduction
from fedlscl.federated.checkpoint import load_checkpoint
from fedlscl.federated.method import Progress, Stage, StreamShape
from fedlscl.federated.metrics import AT_SERVER
from fedlscl.federated.payload import Upload, num_bytes
from fedlscl.federated.pool import LocalPool
from fedlscl.federated.trainer import FederatedTrainer, aggregate
from fedlscl.methods import EWC, FedAvg, FedLSCL, FedNCM, Local, LwF
from fedlscl.modules import ClassificationModule
from tiny_methods import METHODS

TASKS, ROUNDS = 2, 2


@pytest.fixture(scope="module")
def make_method(collaborator_config, foundation_config):
    """A fresh method by name, on tiny nets."""
    small = {"small_model": "test_resnet", "small_image_size": 16, "local_epochs": 1, "batch_size": 8}
    makers = {
        "fedlscl": lambda **options: FedLSCL(collaborator=collaborator_config, local_epochs=1, batch_size=8, **options),
        "fedavg": lambda **options: FedAvg(**small, **options),
        "fedvit": lambda **options: FedAvg(foundation=foundation_config, local_epochs=1, **options),
        "local": lambda: Local(**small),
        "ewc": lambda: EWC(**small, fisher_samples=4),
        "lwf": lambda: LwF(**small),
        "fedncm": lambda: FedNCM(foundation=foundation_config),
        "mfcl": METHODS["MFCL"],
        "target": METHODS["TARGET"],
    }
    return lambda name, **options: makers[name](**options)


class InFolder(Callback):
    """Gives the run a folder and keeps every checkpoint that it writes there."""

    def __init__(self, folder):
        self.folder, self.count = folder, 0

    def on_fit_start(self, trainer):
        trainer.run_dir = self.folder

    def on_checkpoint(self, trainer):
        self.count += 1
        (self.folder / "checkpoint.pt").rename(self.folder / f"{self.count}.pt")


class Interrupt(Callback):
    """Ends the run when a hook is called for the n-th time."""

    def __init__(self, hook, number):
        self.left = number
        setattr(self, hook, self.count)

    def count(self, trainer, *arguments):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


class Events(Callback):
    """Writes down every hook that is called."""

    def __init__(self):
        self.names = []
        for name in dir(Callback):
            if name.startswith("on_"):
                setattr(self, name, lambda trainer, *arguments, name=name: self.names.append(name))


def nets(trainer):
    return {f"{c.id}.{name}": value for c in trainer.clients for name, value in c.net.state_dict().items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def same_results(left, right):
    return (
        same(nets(left), nets(right))
        and torch.equal(left.matrix.values.nan_to_num(-1), right.matrix.values.nan_to_num(-1))
        and same(left.run.traffic, right.run.traffic)
        and left.run.history == right.run.history
    )


@pytest.fixture(scope="module")
def whole(make_method, federate, tmp_path_factory):
    """An uninterrupted FedLSCL run of two tasks of two rounds with all its checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    return federate(make_method("fedlscl"), rounds_per_task=ROUNDS, callbacks=[InFolder(folder)]), folder


def test_the_same_seed_gives_the_same_bytes(whole, make_method, federate, tmp_path):
    first, folder = whole
    second = federate(make_method("fedlscl"), rounds_per_task=ROUNDS, callbacks=[InFolder(tmp_path)])
    assert same_results(first, second)
    names = [f"{number}.pt" for number in range(1, TASKS * ROUNDS + 1)]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert all((folder / name).read_bytes() == (tmp_path / name).read_bytes() for name in names)


def test_another_seed_gives_another_run(make_method, federate):
    runs = [federate(make_method("fedvit"), seed=seed) for seed in (42, 1999)]
    assert not same(nets(runs[0]), nets(runs[1]))
    splits = [[client.data.classes(0).tolist() for client in run.clients] for run in runs]
    assert splits[0] != splits[1]


@pytest.mark.parametrize("number", range(1, TASKS * ROUNDS + 1))
def test_a_run_from_any_checkpoint_ends_with_the_same_bytes(whole, make_method, make_data, tmp_path, number):
    first, folder = whole
    trainer = FederatedTrainer(rounds_per_task=ROUNDS, accelerator="cpu", callbacks=[InFolder(tmp_path)])
    trainer.fit(make_method("fedlscl"), make_data(), checkpoint=folder / f"{number}.pt")
    assert same_results(first, trainer)
    for later, path in enumerate(sorted(tmp_path.iterdir()), start=number + 1):
        assert path.read_bytes() == (folder / f"{later}.pt").read_bytes()
    assert len(list(tmp_path.iterdir())) == TASKS * ROUNDS - number


@pytest.mark.parametrize("name", ["ewc", "lwf", "fedncm", "mfcl", "target"])
def test_other_methods_private_memory_and_server_state_resume(make_method, make_data, federate, tmp_path, name):
    """In the first task and after it; tests/test_resume.py has the middle of the second one, for every method."""
    whole = federate(make_method(name), rounds_per_task=ROUNDS, callbacks=[InFolder(tmp_path)])
    for number in (1, 2):
        trainer = FederatedTrainer(rounds_per_task=ROUNDS, accelerator="cpu")
        trainer.fit(make_method(name), make_data(), checkpoint=tmp_path / f"{number}.pt")
        assert same_results(whole, trainer)


@pytest.mark.parametrize(
    ("hook", "number"),
    [("on_batch_end", 9), ("on_stage_end", 5), ("on_evaluation_start", 3), ("on_server_end", 2), ("on_task_end", 1)],
)
def test_a_run_that_was_interrupted_anywhere_goes_on_as_if_nothing_had_happened(
    whole, make_method, make_data, tmp_path, hook, number
):
    class Last(Callback):
        def on_fit_start(self, trainer):
            trainer.run_dir = tmp_path

    first, _ = whole
    with pytest.raises(KeyboardInterrupt):
        stopped = FederatedTrainer(
            rounds_per_task=ROUNDS, accelerator="cpu", callbacks=[Last(), Interrupt(hook, number)]
        )
        stopped.fit(make_method("fedlscl"), make_data())
    trainer = FederatedTrainer(rounds_per_task=ROUNDS, accelerator="cpu")
    trainer.fit(make_method("fedlscl"), make_data(), checkpoint=tmp_path / "checkpoint.pt")
    assert same_results(first, trainer)


def test_a_checkpoint_holds_tensors_and_plain_values_and_no_foundation_weights(whole):
    trainer, folder = whole
    state = load_checkpoint(folder / "1.pt")

    def leaves(value):
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
        return [value] if parts is None else [leaf for part in parts for leaf in leaves(part)]

    found = leaves(state)
    assert {type(leaf) for leaf in found} <= {torch.Tensor, str, int, float, type(None)}
    frozen = trainer.clients[0].net.foundation.vit.state_dict().values()
    large = [value for value in frozen if value.numel() > 1000]
    assert large
    tensors = [leaf for leaf in found if isinstance(leaf, torch.Tensor)]
    assert not any(a.shape == b.shape and torch.equal(a, b) for a in tensors for b in large)


@pytest.mark.parametrize("name", ["fedlscl", "fedavg"])
def test_who_works_first_changes_nothing(make_method, make_data, federate, name, monkeypatch):
    """The server adds up in the order of the clients' ids, whoever answered first."""

    plain = federate(make_method(name), data=make_data(num_clients=3, fake_classes=8), rounds_per_task=ROUNDS)
    backwards = FederatedTrainer(rounds_per_task=ROUNDS, accelerator="cpu")
    train = LocalPool.train
    monkeypatch.setattr(
        LocalPool, "train", lambda pool, progress, sampled, **more: train(pool, progress, sampled[::-1], **more)
    )
    backwards.fit(make_method(name), make_data(num_clients=3, fake_classes=8))
    assert same(nets(plain), nets(backwards))
    assert [entry["client"] for entry in backwards.run.history[:3]] == [2, 1, 0]


def test_the_server_may_meet_the_clients_once_per_task(make_method, federate):
    uploads, seen = [], []
    method = make_method("fedvit")
    upload, aggregate = method.upload, method.aggregate
    method.upload = lambda client: uploads.append((client.task, client.round)) or upload(client)
    method.aggregate = lambda messages, progress: seen.append(progress.position) or aggregate(messages, progress)
    trainer = federate(method, rounds_per_task=3, server_every="task")
    assert seen == [(0, 2), (1, 2)]
    assert uploads == [(0, 2), (0, 2), (1, 2), (1, 2)]
    for values in trainer.run.traffic.values():
        assert not values[:, :, :2].any() and values[:, :, 2].all()
    every_round = federate(make_method("fedvit"), rounds_per_task=3)
    assert every_round.run.traffic["up"].all() and not same(nets(trainer), nets(every_round))


def test_statistics_reach_a_server_that_meets_the_clients_once_per_task(make_method, federate):
    runs = [federate(make_method("fedncm"), rounds_per_task=2, server_every=every) for every in ("round", "task")]
    assert same(nets(runs[0]), nets(runs[1]))


def test_a_round_of_server_every_task_equals_longer_local_work(make_method, federate):
    """With one round per task the two cadences are the same."""
    runs = [federate(make_method("fedvit"), server_every=every) for every in ("round", "task")]
    assert same(nets(runs[0]), nets(runs[1]))


def test_max_tasks_stops_early_without_changing_what_was_learned(make_method, federate):
    short, long = federate(make_method("fedavg"), max_tasks=1), federate(make_method("fedavg"))
    assert short.run.num_tasks == 1 and short.matrix.values.shape[-2:] == (1, 1)
    assert torch.equal(short.matrix.of("task_il")[:, 0, 0], long.matrix.of("task_il")[:, 0, 0])
    assert short.run.history == [entry for entry in long.run.history if entry["task"] == 0]
    assert federate(make_method("fedvit"), max_tasks=9).run.num_tasks == TASKS


def test_the_matrix_holds_what_the_final_nets_score(whole):
    trainer, _ = whole
    for client in trainer.clients:
        for task in range(TASKS):
            batch = client.data.fetch(client.data.test_ids(task))
            with torch.no_grad():
                logits = client.net.eval()(batch.images).logits
            for mask, classes in (("task_il", client.data.classes(task)), ("class_il", client.seen)):
                accuracy = (classes[logits[:, classes].argmax(1)] == batch.labels).double().mean()
                assert trainer.matrix.of(mask)[client.id, 1, task].item() == pytest.approx(accuracy.item())
    for mask in ("task_il", "class_il"):
        for phase in ("before", "after"):
            values = trainer.matrix.of(mask, phase)
            assert values[:, 0, 1].isnan().all()
            assert not values[:, [0, 1, 1], [0, 0, 1]].isnan().any()


def test_before_and_after_tell_what_the_server_did(make_method, federate):
    averaged, local = federate(make_method("fedavg")), federate(make_method("local"))
    for mask in ("task_il", "class_il"):
        alone, before = local.matrix.of(mask, "before"), averaged.matrix.of(mask, "before")
        assert torch.equal(alone.nan_to_num(-1), local.matrix.of(mask, "after").nan_to_num(-1))
        assert torch.equal(alone[:, 0, 0], before[:, 0, 0])  # the same local work, not yet averaged
        assert not torch.equal(before.nan_to_num(-1), averaged.matrix.of(mask, "after").nan_to_num(-1))


def test_traffic_is_what_was_really_sent(make_method, federate):
    sent, num_synced_rounds = {}, {}
    method = make_method("fedlscl")
    upload, aggregate = method.upload, method.aggregate

    def record(client):
        sent[client.id, client.task, client.round] = payload = upload(client)
        return payload

    def record_answers(uploads, progress):
        answers = aggregate(uploads, progress)
        num_synced_rounds.update({(i, *progress.position): answer for i, answer in enumerate(answers)})
        return answers

    method.upload, method.aggregate = record, record_answers
    trainer = federate(method, rounds_per_task=2)
    assert len(sent) == len(num_synced_rounds) == 2 * TASKS * 2
    for name, messages in (("up", sent), ("down", num_synced_rounds)):
        for place, payload in messages.items():
            assert trainer.run.traffic[name][place] == num_bytes(payload) > 0
            assert trainer.run.traffic[f"{name}_values"][place] == sum(value.numel() for value in payload.values())


def test_hooks_are_called_in_the_order_of_algorithm_1(make_method, make_data, tmp_path):
    events = Events()
    trainer = FederatedTrainer(
        accelerator="cpu", rounds_per_task=1, max_tasks=1, callbacks=[InFolder(tmp_path), events]
    )
    trainer.fit(make_method("fedvit"), make_data())
    batches = len(make_data().at(0, 0).train_dataloader())
    client = [
        "on_client_start",
        "on_stage_start",
        *["on_batch_end"] * batches,
        "on_stage_end",
        "on_evaluation_start",
        "on_evaluation_end",
    ]
    middle = [name for name in events.names if name not in client]
    assert middle == [
        "on_fit_start",
        "on_task_start",
        "on_round_start",
        "on_server_end",
        "on_round_end",
        "on_task_end",
        "on_checkpoint",
        "on_fit_end",
    ]
    first = events.names.index("on_client_start")
    assert [name for name in events.names[first:] if name != "on_batch_end"][:5] == [
        name for name in client if name != "on_batch_end"
    ]


class Serving(FedAvg):
    """FedAvg whose server trains a net of its own, and draws a number when it aggregates."""

    num_stages = 2

    def server_stages(self, uploads, progress):
        for number in range(self.num_stages):
            net = self.build_net(0, StreamShape(6))
            self.places.append((progress, number, torch.rand(()).item(), len(uploads)))
            batch = self.data.fetch(self.data.train_ids(0))
            yield Stage("serving", ClassificationModule(net, self.data.classes(0)), [batch], 1)

    def aggregate(self, uploads, progress):
        self.draws.append(torch.rand(()).item())
        return super().aggregate(uploads, progress)


@pytest.fixture(scope="module")
def serving(federate, make_data):
    """Runs without and with training at the server, and the events of the second."""
    runs = []
    for number, callbacks in ((0, []), (2, [Events()])):
        method, data = Serving(small_model="test_resnet", small_image_size=16, local_epochs=1), make_data()
        data.setup()
        method.num_stages, method.places, method.draws, method.data = number, [], [], data.stream(0)
        runs.append((federate(method, data, rounds_per_task=ROUNDS, callbacks=callbacks), callbacks))
    return runs


def test_training_at_the_server_moves_no_random_number_of_anyone_else(serving):
    (plain, _), (trained, _) = serving
    assert same(nets(plain), nets(trained)) and plain.method.draws == trained.method.draws
    drawn = [number for _, _, number, _ in trained.method.places]
    assert len(set(drawn)) == len(drawn) == TASKS * ROUNDS * 2 and not set(drawn) & set(trained.method.draws)


def test_stages_of_the_server_are_in_the_history_and_heard_of(serving):
    trainer, (events,) = serving[1]
    at_server = [entry for entry in trainer.run.history if entry["client"] == AT_SERVER]
    assert [(entry["task"], entry["round"]) for entry in at_server] == [(n, r) for n in (0, 1) for r in (0, 0, 1, 1)]
    assert all(entry["stage"] == "serving" and entry["terms"]["loss"] > 0 for entry in at_server)
    assert len(trainer.run.history) == TASKS * ROUNDS * 4 == events.names.count("on_stage_end")
    assert events.names.count("on_client_start") == TASKS * ROUNDS * 2


def test_methods_are_told_the_last_round_and_the_final_task(serving):
    told = [(*progress.position, progress.last, progress.final) for progress, *_ in serving[1][0].method.places[::2]]
    assert told == [(0, 0, False, False), (0, 1, True, False), (1, 0, False, True), (1, 1, True, True)]


def test_progress_is_saved_as_its_place(whole):
    assert Progress(1, 2, last=True, final=True).position == (1, 2)
    assert load_checkpoint(whole[1] / "1.pt")["progress"] == [0, 1]


def test_observers_hear_of_an_error(make_method, make_data):
    events = Events()
    trainer = FederatedTrainer(accelerator="cpu", callbacks=[events, Interrupt("on_round_start", 1)])
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(make_method("fedvit"), make_data())
    assert events.names[-1] == "on_exception" and "on_fit_end" not in events.names


def test_observers_change_nothing(make_method, make_data, federate):
    class Noisy(Callback):
        def on_stage_start(self, trainer, client, stage):
            torch.rand(17)

        def on_round_end(self, trainer):
            torch.manual_seed(0)

    assert same_results(federate(make_method("fedavg"), callbacks=[Noisy()]), federate(make_method("fedavg")))


def test_the_cache_changes_no_more_than_rounding(make_method, federate):
    with_cache, without = federate(make_method("fedlscl")), federate(make_method("fedlscl"), cache_gb=0)
    for name, value in nets(with_cache).items():
        torch.testing.assert_close(value, nets(without)[name], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds_per_task": 0}, "rounds_per_task must be >= 1, got 0"),
        ({"max_tasks": 0}, "max_tasks must be >= 1, got 0"),
        ({"cache_gb": -1.0}, "cache_gb must be >= 0, got -1.0"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FederatedTrainer(**options)


def test_augmented_training_serves_no_cached_tokens_says_so_and_repeats_to_the_bit(make_method, make_data, monkeypatch):
    seen = []

    class Spy(Callback):
        def on_stage_start(self, trainer, client, stage):
            place = trainer.engine.prepare
            monkeypatch.setattr(
                trainer.engine, "prepare", lambda *given: seen.append(place(*given)) or seen[-1], raising=False
            )

        def on_stage_end(self, trainer, client, stage, terms, seconds):
            monkeypatch.undo()

    def run(**changed):
        trainer = FederatedTrainer(rounds_per_task=1, accelerator="cpu", callbacks=[Spy()], max_tasks=2)
        trainer.fit(make_method("fedlscl"), make_data(**changed))
        return trainer

    first, second = (run(augment="standard") for _ in range(2))
    assert seen and all(batch.prefix is None and batch.augmented for batch in seen)
    for one, other in zip(first.clients, second.clients, strict=True):
        assert all(torch.equal(value, other.net.state_dict()[name]) for name, value in one.net.state_dict().items())
    assert any("augment" in line and "no cached ViT tokens" in line for line in introduction(first.run))
    seen.clear()
    plain = run()
    assert seen and all(batch.prefix is not None for batch in seen)
    assert not any("augment" in line for line in introduction(plain.run))


def test_a_server_step_with_too_few_answers_names_the_method():
    class OneAnswer(FedAvg):
        def aggregate(self, uploads, progress):
            return []

    upload = Upload(client=0, task=0, round=0, payload={}, class_counts=torch.ones(1))
    with pytest.raises(ValueError, match=r"OneAnswer\.aggregate must return one answer for each of 1 uploads, got 0"):
        aggregate(OneAnswer(), 0, [upload], Progress(0, 0))
