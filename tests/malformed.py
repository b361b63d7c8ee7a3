"""Thirteen ways in which an upload can be wrong, each at a random place; for tests and for benchmarks/robustness.py."""

import json
import math
from dataclasses import replace

import torch

from fedlscl.callbacks import Callback
from fedlscl.federated.payload import Upload, read_message, write_payload


def unknown_sender(upload, picker):
    return [replace(upload, client=picker.choice([-1, 17, 10**9, -(2**63)]))]


def sent_twice(upload, picker):
    name = _name(upload, picker)
    return picker.choice([[upload, upload], [upload, _with(upload, name, 2 * upload.payload[name])]])


def wrong_task(upload, picker):
    return [replace(upload, task=upload.task + picker.choice([-1, 1, 7, 2**40]))]


def wrong_round(upload, picker):
    return [replace(upload, round=upload.round + picker.choice([-1, 1, 7, 2**40]))]


def too_large(upload, picker):
    """More bytes than the largest accepted upload."""
    huge = torch.zeros(1).expand(2**28 + picker.randrange(2**20))
    return [_with(upload, picker.choice([_name(upload, picker), "more"]), huge)]


def broken_bytes(upload, picker):
    """Cut short, a header that claims too much, a name twice, tensors that overlap, a hole, another file."""
    data = write_payload(upload.payload)
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    names = [name for name in header if name != "__metadata__"]
    name = picker.choice(names)
    kind = picker.randrange(7)
    if kind == 0:
        return [data[: picker.randrange(len(data))]]
    if kind == 1:
        return [picker.choice([2**24, 2**40, 2**63, 2**64 - 1]).to_bytes(8, "little") + data[8:]]
    if kind == 2:
        text = json.dumps(header)
        entry = json.dumps({name: header[name]})[1:-1]
        return [_framed(f"{{{entry}, {text[1:]}", body)]
    if kind == 3:
        start, end = header[name]["data_offsets"]
        header[name]["data_offsets"] = [start - 1, end - 1] if start else [start + 1, end + 1]
    elif kind == 4:
        header[name]["data_offsets"][1] += picker.choice([1, 4, 2**40])
    elif kind == 5:
        header[name]["shape"] = [*header[name]["shape"], picker.choice([2, 2**40, -1])]
    else:
        return [b"[" * picker.randrange(8, 10**5) + picker.randbytes(40)]
    return [_framed(json.dumps(header), body)]


def name_missing(upload, picker):
    name = _name(upload, picker)
    return [replace(upload, payload={n: v for n, v in upload.payload.items() if n != name})]


def name_unknown(upload, picker):
    name = picker.choice(["more", "__class__", "../x", "head.weight\n", "\x1b[2J"])
    return [_with(upload, name, torch.zeros(picker.randrange(1, 4)))]


def wrong_shape(upload, picker):
    name = _name(upload, picker)
    value = upload.payload[name]
    return [_with(upload, name, picker.choice([value[None], value.new_zeros(*value.shape, 2), value.new_zeros(0)]))]


def wrong_dtype(upload, picker):
    name = _name(upload, picker)
    value = upload.payload[name]
    others = [t for t in (torch.float16, torch.float64, torch.int32, torch.bool, torch.complex64) if t != value.dtype]
    return [_with(upload, name, value.to(picker.choice(others)))]


def not_finite(upload, picker):
    return [_poisoned(upload, picker, [math.nan, math.inf, -math.inf])]


def far_too_large(upload, picker):
    """Finite, but the norm is beyond any that a client of these sends."""
    return [_poisoned(upload, picker, [1e12, -1e15, 1e25, 1e37])]


def wrong_counts(upload, picker):
    counts = upload.class_counts.clone()
    place = picker.randrange(len(counts))
    kind = picker.randrange(5)
    if kind == 0:
        counts[place] = -picker.randrange(1, 2**40)
    elif kind == 1:
        counts[place] = picker.randrange(10**9, 2**62)
    elif kind == 2:
        counts = counts[:-1] if picker.random() < 0.5 else torch.cat([counts, counts])
    elif kind == 3:
        counts = counts.to(picker.choice([torch.float32, torch.int32, torch.uint8]))
    else:
        counts = picker.choice([counts[None], [1, 2], None])
    return [replace(upload, class_counts=counts)]


KINDS = {
    kind.__name__: kind
    for kind in (
        unknown_sender, sent_twice, wrong_task, wrong_round, too_large, broken_bytes, name_missing, name_unknown,
        wrong_shape, wrong_dtype, not_finite, far_too_large, wrong_counts,
    )
}  # fmt: skip
"""Functions of a valid upload and a `random.Random`; they return what arrives instead: uploads, or bytes."""


def deliver(validator, upload, arrived, progress):
    """Uploads among what arrived from a client; unreadable bytes are rejected as by a server."""
    uploads = []
    for item in arrived:
        try:
            uploads.append(item if isinstance(item, Upload) else replace(upload, payload=read_message(item, 2**30)[1]))
        except ValueError as error:
            assert "\n" not in str(error)
            validator.reject(upload.client, progress, str(error))
    return uploads


class Tamper(Callback):
    """Replaces one client's upload in one round."""

    def __init__(self, client, task, round_, spoil):
        self.client, self.place, self.spoil = client, (task, round_), spoil

    def on_fit_start(self, trainer):
        filter = trainer.validator.filter

        def tampered(uploads, progress):
            arrived = []
            for upload in uploads:
                is_bad = upload.client == self.client and progress.position == self.place
                items = self.spoil(upload) if is_bad else [upload]
                arrived += deliver(trainer.validator, upload, items, progress)
            return filter(arrived, progress)

        trainer.validator.filter = tampered


def _name(upload, picker):
    return picker.choice(sorted(upload.payload))


def _with(upload, name, value):
    return replace(upload, payload={**upload.payload, name: value})


def _poisoned(upload, picker, values):
    name = picker.choice(sorted(n for n, v in upload.payload.items() if v.is_floating_point() and v.numel()))
    value = upload.payload[name].clone(memory_format=torch.contiguous_format)
    value.view(-1)[picker.randrange(value.numel())] = picker.choice(values)
    return _with(upload, name, value)


def _framed(header, body):
    data = header.encode()
    return len(data).to_bytes(8, "little") + data + body
