"""Bad input: one line that names the thing, its value and the remedy, status 2, no traceback, nothing half-written."""

import errno
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import tiny
from fedlscl.__main__ import main
from fedlscl.federated import checkpoint

CUDA = torch.cuda.is_available()


@pytest.fixture
def refused(tmp_path, capsys):
    """Run a command, check how it is refused, and return its one line."""

    def run(*arguments):
        folder = tmp_path / "runs"
        assert main([*arguments, *tiny.inside(folder)]) == 2
        captured = capsys.readouterr()
        lines = captured.err.splitlines()
        assert len(lines) == 1, captured.err
        assert lines[0].startswith("fedlscl: error: ")
        assert captured.out == ""
        assert not folder.exists()
        return lines[0].removeprefix("fedlscl: error: ")

    return run


@pytest.mark.parametrize(
    ("options", "said"),
    [
        # Unknown keys, at every depth.
        ("--trainer.rounds 3", "trainer.rounds is unknown: did you mean trainer.rounds_per_task?"),
        ("--method.local_epoch 3", "method.local_epoch is unknown to FedLSCL: did you mean method.local_epochs?"),
        (
            "--method.collaborator.blok 3",
            "method.collaborator.blok is unknown to FedLSCL: did you mean method.collaborator.blocks?",
        ),
        ("--method.collaborator.foundation.nam x", "did you mean method.collaborator.foundation.name?"),
        (
            "--method FedProx --method.collaborator.blocks all",
            "method.collaborator.foundation.name is unknown to FedProx: ",
        ),
        ("--trainer.norm_factor 3", "trainer.norm_factor was renamed: use trainer.max_norm_ratio."),
        ("--method.num_tasks 3", "method.num_tasks was renamed: use data.num_tasks."),
        (
            "--method.collaborator.adapted_weight 0",
            "method.collaborator.adapted_weight was renamed: use trainer.readouts.heads.",
        ),
        ("--method.collaborator.block 3", "method.collaborator.block was renamed: use method.collaborator.blocks."),
        ("positional", "positional is unknown: --help lists what there is."),
        ("--method FedProxx", "method='FedProxx' is unknown: did you mean FedProx?"),
        ("--method pilra", "method='pilra' is unknown: did you mean PILoRA?"),
        ("--method nothing.Foo", "method='nothing.Foo' cannot be used (No module named 'nothing')"),
        # Wrong types and values.
        ("--trainer.rounds_per_task three", "trainer.rounds_per_task must be int, got 'three'."),
        ("--data.num_clients 1.5", "data.num_clients must be int, got '1.5'."),
        ("--method.local_epochs x", "method.local_epochs must be int, got 'x'."),
        ("--method.collaborator.blocks x", "method.collaborator.blocks must be "),
        ("--method.head_aggregation x", "method.head_aggregation must be 'classwise' or 'average', got 'x'."),
        (
            "--trainer.precision 8",
            "trainer.precision must be 'auto' or '32-true' or 'bf16-mixed' or '16-mixed', got '8'.",
        ),
        *(
            (f"--seed_everything={value}", f"seed_everything must be from 0 to 4294967295, got {value}.")
            for value in ("-1", "4294967296")
        ),
        *((f"--seed_everything={value}", "seed_everything must be int") for value in "true 1.0 x 1e3".split()),
        ("--seed_everything null", "seed_everything is missing: add --seed_everything VALUE."),
        ("--trainer.rounds_per_task", "argument --trainer.rounds_per_task: expected one argument"),
        ("--trainer.rounds_per_task 0", "rounds_per_task must be >= 1, got 0."),
        ("--method.lr 0", "lr must be > 0, got 0.0."),
        ("--method.batch_size 0", "batch_size must be >= 1, got 0."),
        ("--method.generator_lr -1", "generator_lr must be > 0, got -1.0."),
        ("--method.lambda_proximal 0", "lambda_proximal must be > 0, got 0.0."),
        ("--method.buffer_per_class -1", "buffer_per_class must be >= 0, got -1."),
        # Classes that do not add up.
        ("--data.private_classes 4", "4 private x 2 clients + 2 public = 10 classes, but the data set has 6"),
        ("--data.num_tasks 3", "cannot be cut into 3 equal tasks: set num_tasks to one of 1, 2, 4"),
        (
            "--data.num_clients 7 --data.private_classes 0",
            "must have at least 7 train samples, one per client, got 6: lower num_clients",
        ),
        # Nets.
        (
            "--method.collaborator.small_model resnet19",
            "small_model 'resnet19' is unknown to timm: did you mean resnet18",
        ),
        ("--method.collaborator.foundation.name deit_tinny_patch16_224", "did you mean deit_tiny_patch16_224"),
        (
            "--method.collaborator.foundation.name resnet18",
            "unexpected keyword argument 'img_size'): choose a name such as vit_*",
        ),
        ("--method.collaborator.blocks [12]", "block must be 0 to 5 for test_vit, got 12."),
        ("--method.collaborator.rank 0", "rank must be >= 1, got 0."),
        (
            "--method.collaborator.foundation.image_size 33",
            "image_size must be a multiple of the patch size 16",
        ),
        ("--method.collaborator.foundation.weights no.safetensors", "or 'random', got 'no.safetensors'"),
        # Data.
        ("--data.image_size 0", "image_size must be in [1, 4096], got 0."),
        ("--data.image_size -5", "image_size must be in [1, 4096], got -5"),
        ("--data.image_size 100000000", "image_size must be in [1, 4096], got 100000000"),
        ("--data.seed -1", "seed must be >= 0, got -1"),
        ("--data.train_per_class -1", "train_per_class must be >= 1, got -1"),
        ("--data.test_per_class 0", "test_per_class must be >= 1, got 0"),
        ("--data.train_per_class 1000000000", "fake images must take at most 2,147,483,648 bytes, got"),
        ("--data.num_workers 1000000", "num_workers must be in [0, 256], got 1000000"),
        ("--data.dirichlet_alpha 1e308", "dirichlet_alpha must be in (0, 1e9], got 1e+308"),
        (
            "--data.dataset imagenet --data.image_size null",
            "dataset must be 'cifar100', 'imagenet-r', 'folder', 'digits', 'fake', the name of",
        ),
        ("--data.dataset folder", "root must be the folder of data set 'folder', got None: set root."),
        ("--data.dataset folder --data.root no/where", "image folder no/where is missing: set root to a folder"),
        ("--data.dataset x.npz --data.image_size null", "x.npz is missing: set root to its folder"),
        ("--data.manifest no.json", "manifest no.json cannot be read (No such file or directory)"),
        # Devices.
        ("--trainer.accelerator abacus", "accelerator must be available, got 'abacus'"),
        ("--trainer.devices 0", "devices must be >= 1, got 0."),
        ("--trainer.precision 16-mixed", "precision must be bf16-mixed or 32-true without CUDA, got '16-mixed'."),
        # Places.
        ("--ckpt_path no/where", "checkpoint 'no/where' does not exist: run fedlscl fit first"),
        (
            "--config no.yaml",
            "config 'no.yaml' cannot be read (No such file or directory): give the path of a YAML file.",
        ),
    ],
)
def test_option_is_refused(options, said, refused):
    assert said in refused("fit", *tiny.FEDLSCL, *options.split())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("trainer: {rounds: 3}", "trainer.rounds is unknown: did you mean trainer.rounds_per_task?"),
        ("nonsense: 3", "nonsense is unknown"),
        ("data: {concentration: 1}", "data.concentration was renamed: use data.dirichlet_alpha."),
        ("trainer: {rounds_per_task: three}", "trainer.rounds_per_task must be int, got 'three'."),
        ("method: {class_path: FedAvg, init_args: {small_modl: x}}", "did you mean method.small_model?"),
        (
            "method: {class_path: FedAvg, init_args: {foundation: {nam: x}}}",
            "method.foundation.nam is unknown to FedAvg",
        ),
        ("method: {class_path: FedAvg, init_args: {batch_size: x}}", "method.batch_size must be int, got 'x'."),
        ("method: {class_path: FedAvg, lr: 3}", "class_path is unknown beside options: put these under init_args."),
        ("trainer: [\n", "must be valid YAML, got an error ("),
        *(
            (f"seed_everything: {value}", f"seed_everything must be from 0 to 4294967295, got {value}.")
            for value in ("-1", "4294967296")
        ),
        *((f"seed_everything: {value}", "seed_everything must be int") for value in "true 1.0 x 1e3".split()),
        ("seed_everything: null", "seed_everything is missing: add --seed_everything VALUE."),
        ("data: {num_tasks: null}", "data.num_tasks is missing: add --data.num_tasks VALUE."),
        ("method: {class_path: FedAvg, init_args: {lr: null}}", "method.lr is missing: add --method.lr VALUE."),
        ("method: null", "method is missing: add --method VALUE."),
        ("data:", "must have options under 'data:', got None."),
        ("trainer: 3", "must have options under 'trainer:', got 3."),
        (
            "method: {class_path: FedLSCL, init_args: {collaborator: {block: 3}}}",
            "method.collaborator.block was renamed: use method.collaborator.blocks.",
        ),
        (
            "trainer: {callbacks: [{class_path: fedlscl.callbacks.Nothing}]}",
            "trainer.callbacks='fedlscl.callbacks.Nothing' cannot be used (module 'fedlscl.callbacks' has no attribute "
            "'Nothing'): give module.Class.",
        ),
        ("seed_everything: 1\nseed_everything: 2", "must have seed_everything once, got it 2 times"),
        ("trainer: {rounds_per_task: 1}\ndata: {}\ntrainer: {}", "must have trainer once"),
        ("trainer:\n  rounds_per_task: 1\n  rounds_per_task: 1", "must have trainer.rounds_per_task once"),
        ("trainer: {rounds_per_task: 1}\ntrainer.rounds_per_task: 2", "must have trainer.rounds_per_task once"),
        ('{"data": {"root": "a", "root": "b"}}', "must have data.root once"),
        ("method: {class_path: FedAvg, init_args: {lr: 1, lr: 2}}", "must have method.init_args.lr once"),
        ("method: {init_args: {collaborator: {foundation: {name: a, name: b}}}}", "foundation.name once"),
        ("method: {class_path: fedavgg}", "did you mean FedAvg?"),
        ("method: fedavgg", "did you mean FedAvg?"),
        ("just words", "must have groups such as 'trainer:' and 'data:', got str."),
        ("", "got NoneType."),
    ],
)
def test_configuration_file_is_refused(text, said, refused, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    assert said in refused("fit", "--config", str(tmp_path / "config.yaml"))


def test_nothing_else_is_said_by_a_process_of_its_own(tmp_path):
    command = [sys.executable, "-m", "fedlscl", "fit", *tiny.FEDLSCL, "--method.collaborator.blocks", "[12]"]
    done = subprocess.run([*command, *tiny.inside(tmp_path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "fedlscl: error: block must be 0 to 5 for test_vit, got 12.\n"
    assert list(tmp_path.iterdir()) == []


def test_several_configuration_files_may_set_the_same_key(tmp_path, capsys):
    for number in (1, 2):
        (tmp_path / f"{number}.yaml").write_text(f"trainer: {{rounds_per_task: {number}}}")
    files = [word for number in (1, 2) for word in ("--config", str(tmp_path / f"{number}.yaml"))]
    assert main(["fit", *files, "--print_config"]) == 0
    assert "rounds_per_task: 2" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["method: fedprox", "method: {class_path: FEDPROX}", "method: {class_path: FedProx}"])
def test_a_method_in_a_file_is_found_in_any_case_as_on_the_command_line(text, tmp_path, capsys):
    (tmp_path / "a.yaml").write_text(text)
    assert main(["fit", "--config", str(tmp_path / "a.yaml"), "--method.mu", "0.5", "--print_config"]) == 0
    printed = capsys.readouterr().out
    assert "FedProx" in printed and "mu: 0.5" in printed


@pytest.mark.parametrize("options", [["--data.batch_size", "2"], ["--data.batch_size=32"], []])
def test_a_batch_size_without_effect_is_said(options, tmp_path, capsys):
    assert main(["fit", "--dry_run", *tiny.FEDAVG, *tiny.inside(tmp_path), *options]) == 0
    said = "data.batch_size has no effect on fit: set method.batch_size.\n" if options else ""
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("command", [["methods"], ["--help"]])
def test_a_closed_pipe_ends_silently_with_the_status_of_sigpipe(command):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "fedlscl", *command], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_what_standard_output_cannot_encode_is_escaped():
    program = "import sys; from fedlscl import __main__ as m; m.HELP = 'été'; sys.exit(m.main([]))"
    for encoding, expected in (("ascii", b"\\xe9t\\xe9"), ("utf-8", "été".encode())):
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment)
        assert (done.returncode, done.stdout, done.stderr) == (0, expected, b"")


def test_command_is_refused(capsys):
    assert main(["fitt"]) == 2
    assert capsys.readouterr().err == "fedlscl: error: command 'fitt' is unknown: did you mean fit?\n"


@pytest.mark.skipif(CUDA, reason="this machine has CUDA")
@pytest.mark.parametrize("accelerator", ["cuda", "gpu"])
def test_cuda_is_refused_where_it_is_absent(accelerator, refused):
    line = refused("fit", *tiny.FEDLSCL, "--trainer.accelerator", accelerator)
    assert line == f"accelerator must be cpu or auto on a machine without CUDA, got '{accelerator}'."


def test_bf16_is_refused_where_it_is_unsupported(refused, monkeypatch):
    class OldGPU:
        device = torch.device("cuda")

        def __init__(self, **options): ...
        def launch(self): ...

    monkeypatch.setattr("fedlscl.federated.engine.Fabric", OldGPU)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **options: False)
    line = refused("fit", *tiny.FEDLSCL, "--trainer.precision", "bf16-mixed")
    assert line == "precision must be 16-mixed or 32-true on a GPU without bfloat16, got 'bf16-mixed'."


@pytest.mark.parametrize("broken", ["other shapes", "cut short"])
def test_weights_that_do_not_fit_are_refused(broken, refused, tmp_path):
    file = tmp_path / "weights.safetensors"
    save_file({"patch_embed.proj.weight": torch.zeros(3, 3)}, file)
    if broken == "cut short":
        file.write_bytes(file.read_bytes()[:-9])
    line = refused("fit", *tiny.FEDLSCL, "--method.collaborator.foundation.weights", str(file))
    message = {
        "other shapes": f"weights '{file}' do not fit 'test_vit'",
        "cut short": f"a safetensors file, got '{file}'",
    }
    assert message[broken] in line


@pytest.mark.parametrize(
    ("spoil", "said"), [("image", "cannot be read"), ("class", "must hold 2 or more images"), ("all", "is empty")]
)
def test_image_folder_is_refused(spoil, said, refused, tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    for label in range(6 if spoil != "all" else 0):
        (root / f"class{label}").mkdir()
        for number in range(8 if (spoil, label) != ("class", 3) else 0):
            pixels = np.full((16, 16, 3), 40 * label + number, dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"class{label}" / f"{number}.png")
    if spoil == "image":
        (root / "class2" / "1.png").write_bytes(b"no image")
    options = ["--data.dataset", "folder", "--data.root", str(root), "--data.train_per_class", "null"]
    line = refused("fit", *tiny.FEDLSCL, *options, "--data.cache_dir", str(tmp_path / "cache"))
    assert str(root) in line
    assert said in line
    assert ("1.png" in line) == (spoil == "image")


@pytest.mark.parametrize("place", ["file", "no rights"])
def test_run_directory_that_cannot_be_written_is_refused_before_training(place, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "place"
    if place == "file":
        folder.write_text("")
    else:
        folder.mkdir(mode=0o555)
        if os.access(folder, os.W_OK):
            pytest.skip("the superuser may write anywhere")
    monkeypatch.setattr("fedlscl.data.datamodule.load_images", None)
    assert main(["fit", *tiny.FEDLSCL, *tiny.inside(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"run directory '{folder}/FedLSCL' cannot be written" in line
    assert line.endswith("choose another --trainer.default_root_dir.")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    assert main(["fit", *tiny.FEDAVG, *tiny.inside(folder)]) == 0
    return folder / "FedAvg" / "version_0" / "checkpoint.pt"


def damaged(trained, path, damage):
    data = trained.read_bytes()
    if damage == "cut short":
        data = data[: len(data) // 2]
    elif damage == "one bit":
        data = data[:-99] + bytes([data[-99] ^ 1]) + data[-98:]
    elif damage == "foreign":
        data = b"something else"
    path.write_bytes(data)
    for name in ("config.yaml", "manifest.json"):
        path.with_name(name).write_bytes(trained.with_name(name).read_bytes())


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("cut short", "is damaged"),
        ("one bit", "is damaged"),
        ("foreign", "is not a checkpoint of fedlscl"),
        ("newer", "version 99"),
    ],
)
@pytest.mark.parametrize("command", ["fit", "test", "predict"])
def test_checkpoint_is_refused(command, damage, said, trained, tmp_path, refused, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    damaged(trained, path, damage)
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    if damage == "newer":
        state = checkpoint.load_checkpoint(trained)
        del state["version"]
        with monkeypatch.context() as later:
            later.setattr(checkpoint, "VERSION", 99)
            checkpoint.save_checkpoint(path, state)
    options = tiny.FEDAVG if command == "fit" else ["--images", str(tmp_path / "x.png")] if command == "predict" else []
    before = path.read_bytes()
    line = refused(command, *options, "--ckpt_path", str(path))
    assert str(path) in line
    assert said in line
    assert path.read_bytes() == before


@pytest.mark.parametrize("change", ["--method.lr 0.1", "--seed_everything 1", "--data.private_classes 0"])
@pytest.mark.parametrize("command", ["fit", "test"])
def test_checkpoint_of_another_configuration_is_refused(command, change, trained, refused):
    before, config = trained.read_bytes(), str(trained.with_name("config.yaml"))
    line = refused(command, "--config", config, *change.split(), "--ckpt_path", str(trained))
    part = "data set or split" if "data" in change else "configuration"
    assert line.startswith(f"checkpoint '{trained}' belongs to another {part}: use the ")
    assert "config.yaml beside it" in line
    assert trained.read_bytes() == before


@pytest.fixture(scope="module")
def trained_on_weights(tmp_path_factory):
    import timm

    folder = tmp_path_factory.mktemp("weights")
    save_file(timm.create_model("test_vit", num_classes=0, img_size=32).state_dict(), folder / "w.safetensors")
    weights = ["--method.collaborator.foundation.weights", str(folder / "w.safetensors")]
    assert main(["fit", *tiny.FEDLSCL, *weights, *tiny.inside(folder)]) == 0
    return folder / "w.safetensors", folder / "FedLSCL" / "version_0"


@pytest.mark.parametrize("fault", ["moved", "a folder", "other weights"])
@pytest.mark.parametrize("command", ["predict", "test"])
def test_a_trained_run_names_the_weights_that_it_misses(command, fault, trained_on_weights, refused, tmp_path):
    file, run = trained_on_weights
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    moved = file.rename(tmp_path / "moved.safetensors")
    if fault == "a folder":
        file.mkdir()
    elif fault == "other weights":
        save_file({name: value + 1 for name, value in load_file(moved).items()}, file)
    images = ["--images", str(tmp_path / "x.png")] if command == "predict" else []
    try:
        line = refused(command, "--ckpt_path", str(run), *images)
        if fault == "other weights":
            assert "belongs to another configuration" in line and "and the same weights files" in line
        else:
            assert line == f"weights must be a safetensors file, 'timm', 'bundled' or 'random', got {str(file)!r}."
    finally:
        file.rmdir() if file.is_dir() else file.unlink(missing_ok=True)
        moved.rename(file)


def scans(path, change=None):
    """An .npz of 480 + 12 images in four classes, with one thing changed."""
    draw = np.random.default_rng(0)
    arrays = {"class_names": np.array(["benign", "cyst", "healthy", "malignant"])}
    for part, size in (("train", 480), ("test", 12)):
        arrays[f"{part}_images"] = draw.integers(0, 256, (size, 8, 8, 3), np.uint8)
        arrays[f"{part}_labels"] = np.arange(size) % 4
    if change == "pixel":
        arrays["train_images"][1, 2, 3, 0] ^= 1  # Outside an evenly spaced sample of 64 images.
    elif change == "names in another order":
        arrays["class_names"] = arrays["class_names"][::-1]
    elif change == "another name":
        arrays["class_names"] = np.array(["benign", "cyst", "healthy", "melanoma"])
    elif change == "test label":
        arrays["test_labels"][[0, 1]] = arrays["test_labels"][[1, 0]]
    np.savez(path, **arrays)


@pytest.fixture(scope="module")
def trained_on_scans(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scans")
    scans(folder / "scans.npz")
    options = ["--data.dataset", "scans.npz", "--data.root", str(folder), "--data.num_tasks", "1"]
    options += ["--data.private_classes", "1", "--data.image_size", "null", "--data.test_per_class", "null"]
    options += ["--data.train_per_class", "null"]
    assert main(["fit", *tiny.FEDAVG, *options, *tiny.inside(folder)]) == 0
    return [*tiny.FEDAVG, *options], folder / "FedAvg" / "version_0" / "checkpoint.pt"


@pytest.mark.parametrize("change", ["pixel", "test label", "names in another order", "another name"])
def test_a_run_is_not_continued_or_tested_on_changed_data(change, trained_on_scans, refused, tmp_path):
    arguments, trained = trained_on_scans
    scans(tmp_path / "scans.npz", change)
    before = trained.read_bytes()
    for command in ("fit", "test"):
        line = refused(command, *arguments, "--data.root", str(tmp_path), "--ckpt_path", str(trained))
        assert line.startswith(f"checkpoint '{trained}' belongs to another data set or split: use the images, labels")
    line = refused(
        "fit", *arguments, "--data.root", str(tmp_path), "--data.manifest", f"{trained.parent}/manifest.json"
    )
    assert ("must name class" if "name" in change else "belongs to a data set with fingerprint") in line
    assert trained.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--images no.png", "images 'no.png' must be an image file or a folder of images (.bmp, "),
        ("--images EMPTY", ".webp), got a folder without images."),
        ("--images BROKEN", "cannot be read"),
        ("--images GOOD --client 2", "client must be from 0 to 1, got 2."),
        ("--images GOOD --top 0", "top must be >= 1, got 0."),
        ("--images GOOD --out no/where.csv", "could not write no/where.csv (No such file or directory)"),
        ("", "images is missing: add --images VALUE."),
    ],
)
def test_prediction_is_refused(options, said, trained, tmp_path, refused):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.png").write_bytes(b"no image")
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    places = {"EMPTY": "empty", "BROKEN": "broken.png", "GOOD": "good.png"}
    options = [str(tmp_path / places[word]) if word in places else word for word in options.split()]
    assert said in refused("predict", "--ckpt_path", str(trained), *options)


@pytest.fixture
def some_pictures(tmp_path):
    """Three good images, two bad ones, and what is no image."""
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.png", "c.JPG", "deep/e.png"):
        Image.new("RGB", (8, 8), "red").save(folder / name)
    for name in ("b.png", "deep/d.gif", "._a.png", "notes.txt", "f.heic"):
        (folder / name).write_bytes((folder / "a.png").read_bytes()[:40])
    return folder


@pytest.mark.parametrize("chunk", [1, 2, 64])
def test_prediction_answers_for_good_images_and_names_the_bad_ones(chunk, trained, some_pictures, capsys, monkeypatch):
    monkeypatch.setattr("fedlscl.cli.commands.CHUNK", chunk)
    out = some_pictures.parent / "out.csv"
    options = ["--images", str(some_pictures), "--top", "1", "--out", str(out)]
    with pytest.warns(UserWarning, match=r"pictures: left out 2 files \(f.heic, notes.txt\); images end in"):
        assert main(["predict", "--ckpt_path", str(trained), *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    for line, name in zip(captured.err.splitlines(), ("b.png", "deep/d.gif"), strict=True):
        assert line.startswith(f"fedlscl: error: image {some_pictures / name} cannot be read")
    num_synced_rounds = [line.split(",")[0] for line in out.read_text().splitlines()]
    assert num_synced_rounds == ["image", *(str(some_pictures / name) for name in ("a.png", "c.JPG", "deep/e.png"))]


def test_prediction_without_a_good_image_writes_nothing(trained, some_pictures, capsys):
    for name in ("a.png", "c.JPG", "deep/e.png", "notes.txt", "f.heic"):
        (some_pictures / name).unlink()
    out = some_pictures.parent / "out.csv"
    assert main(["predict", "--ckpt_path", str(trained), "--images", str(some_pictures), "--out", str(out)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
    assert not out.exists()


def test_a_warning_takes_one_line(tmp_path):
    for label in range(6):
        (tmp_path / f"class{label}").mkdir()
        for number in range(4):
            Image.new("RGB", (8, 8), (40 * label, 0, 9)).save(tmp_path / f"class{label}" / f"{number}.png")
    (tmp_path / "class1" / "4.heic").write_bytes(b"")
    places = ["--data.dataset", "folder", "--data.root", str(tmp_path), "--data.cache_dir", str(tmp_path / ".cache")]
    command = [sys.executable, "-m", "fedlscl", "fit", *tiny.FEDAVG, *places, "--dry_run"]
    done = subprocess.run([*command, *tiny.inside(tmp_path / ".runs")], capture_output=True, text=True)
    said = "left out 1 file (class1/4.heic); images end in"
    assert [line for line in done.stderr.splitlines() if said in line] == done.stderr.splitlines()
    assert done.stderr.startswith(f"fedlscl: warning: {tmp_path}: {said}")
    assert done.returncode == 0


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, monkeypatch, capsys):
    sync, saves = os.fsync, []

    def full(handle):
        if os.readlink(f"/proc/self/fd/{handle}").endswith(".checkpoint.pt.tmp"):
            saves.append(handle)
            if len(saves) == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    assert main(["fit", *tiny.FEDAVG, *tiny.inside(tmp_path)]) == 2
    run = tmp_path / "FedAvg" / "version_0"
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"could not write {run / 'checkpoint.pt'} (No space left on device); its previous content is intact" in last
    assert last.endswith("free some space, then continue with --ckpt_path last.")
    assert checkpoint.load_checkpoint(run / "checkpoint.pt")["progress"] == [1, 0]
    assert list(run.glob(".*.tmp")) == []
    monkeypatch.undo()
    assert main(["fit", *tiny.FEDAVG, *tiny.inside(tmp_path), "--ckpt_path", "last"]) == 0
    assert main(["fit", *tiny.FEDAVG, *tiny.inside(tmp_path / "again")]) == 0
    assert (run / "checkpoint.pt").read_bytes() == (tmp_path / "again/FedAvg/version_0/checkpoint.pt").read_bytes()
