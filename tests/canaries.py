"""Pickles that make a folder when they are loaded, in every file and message that this package reads."""

import contextlib
import hashlib
import io
import os
import pickle
import zipfile

import numpy as np
import torch
import yaml

from fedlscl.cli.app import read_config
from fedlscl.data.datasets import load_images
from fedlscl.data.images import centre_crop, read_image
from fedlscl.data.split import read_manifest
from fedlscl.federated.checkpoint import MAGIC, load_checkpoint, load_last_good, previous, save_checkpoint
from fedlscl.federated.client import Client
from fedlscl.federated.payload import read_message
from fedlscl.flower.messages import read_reply, read_request
from fedlscl.nets.vit import FoundationConfig, foundation
from fedlscl.report.runs import read_run


class Trap:
    """Makes a folder as soon as somebody unpickles it."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def pickles(folder):
    """The trap in every form in which torch or Python writes a pickle."""
    state = {"version": 2, "identity": "abc", "progress": [0, 0], "trap": Trap(folder)}
    forms = {f"protocol {protocol}": pickle.dumps(state, protocol) for protocol in (0, 2, 5)}
    for name, is_zip in (("torch zip", True), ("torch legacy", False)):
        buffer = io.BytesIO()
        torch.save(state, buffer, _use_new_zipfile_serialization=is_zip)
        forms[name] = buffer.getvalue()
    return forms


def yamls(folder):
    return {
        "apply": f"!!python/object/apply:os.mkdir [{str(folder)!r}]\n",
        "apply in a value": f"seed_everything: !!python/object/apply:os.mkdir [{str(folder)!r}]\n",
        "new": f"method: !!python/object/new:os.mkdir [{str(folder)!r}]\n",
    }


def objects(folder):
    """A NumPy archive and a NumPy file with the trap among their objects."""
    array, archive, file = np.array([Trap(folder)], dtype=object), io.BytesIO(), io.BytesIO()
    np.savez(archive, train_images=array, train_labels=array, test_images=array, test_labels=array)
    np.save(file, array, allow_pickle=True)
    return {"npz": archive.getvalue(), "npy": file.getvalue()}


def controls(folder):
    """What would fire if it were read without care: by name, a function that does."""
    for name, data in pickles(folder).items():
        load = torch.load if name.startswith("torch") else pickle.load
        options = {"weights_only": False} if name.startswith("torch") else {}
        yield f"pickle, {name}", lambda load=load, data=data, options=options: load(io.BytesIO(data), **options)
    for name, text in yamls(folder).items():
        yield f"yaml, {name}", lambda text=text: yaml.unsafe_load(text)
    for name, data in objects(folder).items():

        def careless(data=data):
            found = np.load(io.BytesIO(data), allow_pickle=True)
            return found["train_images"] if hasattr(found, "files") else found

        yield f"numpy, {name}", careless


def canaries(folder, place):
    """Every way in: its name, and a function that writes the trap to ``place`` and has it read."""
    for name, data in pickles(folder).items():
        sealed = MAGIC + hashlib.sha256(data).digest() + data
        for what, content in (("checkpoint", data), ("sealed checkpoint", sealed)):
            yield f"{what}, {name}", lambda content=content: load_checkpoint(_file(place / "c.pt", content))
        yield f"previous checkpoint, {name}", lambda sealed=sealed: _fall_back(place, sealed)
        yield f"parked client, {name}", lambda data=data: _parked(_file(place / "1.pt", data))
        yield f"upload, {name}", lambda data=data: read_message(data)
        yield f"letter, {name}", lambda data=data: read_request(data)
        yield f"reply, {name}", lambda data=data: read_reply(data)
        yield f"weights, {name}", lambda data=data: _weights(_file(place / "w.safetensors", data))
        yield f"image, {name}", lambda data=data: centre_crop(read_image(_file(place / "x.png", data)), 8, 8)
    data = pickles(folder)["protocol 2"]
    for entry in ("data.pkl", "version", "extra.pkl"):
        yield f"checkpoint with {entry} replaced", lambda entry=entry: _replaced(place, entry, data)
    for name in ("results.json", "costs.json", "config.yaml", "manifest.json"):
        yield f"{name}, pickle", lambda name=name: _report(place, name, data)
    yield "manifest, pickle", lambda: read_manifest(_file(place / "m.json", data))
    for name, text in yamls(folder).items():
        yield f"config.yaml, {name}", lambda text=text: read_config(str(_file(place / "c.yaml", text.encode())))
        yield f"config.yaml of the report, {name}", lambda text=text: _report(place, "config.yaml", text.encode())
    for name, content in objects(folder).items():
        yield f"data set, {name}", lambda content=content: load_images(str(_file(place / "d.npz", content)))
    for name in ("train", "test", "meta"):
        yield f"cifar100, {name}", lambda name=name: _cifar(place, name, data)


def spring(function, folder):
    """Whether reading springs the trap; whatever it raises is beside the point."""
    with contextlib.suppress(Exception):
        function()
    sprung = folder.exists()
    if sprung:
        folder.rmdir()
    return sprung


def _file(path, content):
    path.write_bytes(content)
    return path


def _fall_back(place, sealed):
    _file(previous(place / "c.pt"), sealed)
    load_last_good(_file(place / "c.pt", b"damaged"))


def _parked(path):
    client = Client(id=1, net=None, data=None, engine=None)
    client.offloaded_to = path
    client.state_dict()


def _weights(path):
    foundation(FoundationConfig(name="test_vit", weights=str(path), image_size=32))


def _replaced(place, entry, data):
    """A true checkpoint, one member of whose archive is the trap, under a true checksum."""
    save_checkpoint(place / "c.pt", {"identity": "abc", "w": torch.ones(3)})
    body, changed = io.BytesIO((place / "c.pt").read_bytes()[len(MAGIC) + 32 :]), io.BytesIO()
    with zipfile.ZipFile(body) as old, zipfile.ZipFile(changed, "w") as new:
        root = old.namelist()[0].split("/")[0]
        for name in dict.fromkeys([*old.namelist(), f"{root}/{entry}"]):
            new.writestr(name, data if name == f"{root}/{entry}" else old.read(name))
    body = changed.getvalue()
    load_checkpoint(_file(place / "c.pt", MAGIC + hashlib.sha256(body).digest() + body))


def _report(place, name, content):
    good = {"results.json": b'{"schema": 1, "accuracy": {}}', "config.yaml": b"{}", "costs.json": b"{}"}
    for other, text in good.items():
        _file(place / other, text)
    _file(place / name, content)
    read_run(place / "results.json")


def _cifar(place, name, data):
    (place / "cifar-100-python").mkdir(exist_ok=True)
    _file(place / "cifar-100-python" / name, data)
    load_images("cifar100", str(place))
