import itertools
import os
import re
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fedlscl.data import images as decoding
from fedlscl.data.images import ALPHA, GREY16, MODES, OPAQUE, REFUSED, centre_crop, decode, read_image

RANDOM = np.random.default_rng(0)
ORIENTED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}
"""How a picture is stored under each value of EXIF's Orientation, by the definition of TIFF 6.0, page 36."""


def pixels(file):
    return np.asarray(read_image(file))


def over_white(colour, alpha):
    return (colour * (alpha / 255) + 255 - alpha).round()


def png(path, depth, colour, rows, transparent):
    """A PNG of one colour type and bit depth, with a tRNS chunk."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", rows.shape[1], len(rows), depth, colour, 0, 0, 0)
    rows = rows.reshape(len(rows), -1)
    if depth < 8:
        bits = np.unpackbits(rows.astype(np.uint8)[..., None], axis=2)[..., 8 - depth :]
        lines = [np.packbits(line).tobytes() for line in bits.reshape(len(rows), -1)]
    else:
        lines = [line.astype(">u2" if depth == 16 else "u1").tobytes() for line in rows]
    data = zlib.compress(b"".join(b"\0" + line for line in lines))
    body = chunk(b"IHDR", header) + chunk(b"tRNS", transparent) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def tiff(path, bits, photometric, data, width, height, order="<", sample_format=1):
    """A TIFF of one grey channel in one strip."""
    entries = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1)]
    entries += [(278, height), (279, len(data)), (339, sample_format)]
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8 + len(data)) + data
    # Each is a SHORT, left-justified in four bytes.
    body = b"".join(struct.pack(order + "HHIHH", tag, 3, 1, value, 0) for tag, value in entries)
    path.write_bytes(head + struct.pack(order + "H", len(entries)) + body + bytes(4))
    return path


def test_every_mode_of_pillow_has_a_rule_and_a_row_in_the_docs():
    assert set(MODES) == set(Image.MODES), "a new mode of Pillow: decide how it becomes RGB"
    text = (Path(__file__).parents[2] / "docs/own_data.md").read_text()
    rows = {}
    for line in text.splitlines():
        if "`" in line and line.startswith("| `"):
            names, rule = line.split("|")[1:3]
            rows |= dict.fromkeys(re.findall(r"`(\S+)`", names), rule.strip())
    assert rows == MODES


def in_mode(mode):
    """A picture in this mode and its (4, 5, 3) pixels, where they are not Pillow's own conversion."""
    colour, alpha = RANDOM.integers(0, 256, (4, 5, 3), np.uint8), RANDOM.integers(0, 256, (4, 5, 1), np.uint8)
    rgba = Image.fromarray(np.concatenate([colour, alpha], axis=2))
    if MODES[mode] == GREY16:
        levels = RANDOM.integers(0, 2**16, (4, 5), np.uint16)
        raw = levels.astype(">u2" if mode == "I;16B" else "<u2").tobytes()
        return Image.frombytes(mode, (5, 4), raw), (levels / 257).round()[..., None].repeat(3, 2)
    if mode in ("RGBA", "RGBa"):
        return rgba.convert(mode), over_white(colour, alpha)
    if mode in ("LA", "La"):
        grey = rgba.convert("LA")
        return grey.convert(mode), over_white(np.asarray(grey)[..., :1].repeat(3, 2), alpha)
    if mode == "PA":
        image = rgba.convert("RGB").quantize(8).convert("PA")
        image.putalpha(Image.fromarray(alpha[..., 0]))
        return image, over_white(np.asarray(image.convert("RGB")), alpha)
    if mode == "LAB":
        return Image.frombytes("LAB", (5, 4), colour.tobytes()), None
    image = rgba.convert("RGB").convert("L" if mode in ("I", "F") else "RGB").convert(mode)
    return image, None


@pytest.mark.parametrize("mode", Image.MODES)
def test_each_mode_becomes_rgb_as_stated_or_is_refused(mode, tmp_path, monkeypatch):
    image, expected = in_mode(mode)
    assert image.mode == mode
    (tmp_path / "x").touch()
    monkeypatch.setattr(Image, "open", lambda file: image)
    if MODES[mode] == REFUSED:
        with pytest.raises(
            ValueError, match=rf"^image .*x must have .* got Pillow's mode '{mode}' .*: scale it"
        ) as error:
            read_image(tmp_path / "x")
        assert "\n" not in str(error.value)
        return
    expected = np.asarray(image.convert("RGB")) if expected is None else expected
    # Premultiplied colours have lost up to 255 / alpha levels.
    tolerance = {OPAQUE: 0, GREY16: 0, ALPHA: 2 if mode in ("La", "RGBa") else 1}[MODES[mode]]
    np.testing.assert_allclose(pixels(tmp_path / "x"), expected, rtol=0, atol=tolerance)


def test_a_mode_without_a_rule_is_refused(monkeypatch, tmp_path):
    Image.new("L", (3, 3)).save(tmp_path / "x.png")
    monkeypatch.delitem(decoding.MODES, "L")
    with pytest.raises(ValueError, match="got Pillow's mode 'L'"):
        read_image(tmp_path / "x.png")


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_holds_all_levels(tmp_path, suffix):
    levels = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(levels).save(tmp_path / f"x.{suffix}")
    assert (pixels(tmp_path / f"x.{suffix}") == (levels / 257).round()[..., None]).all()


@given(st.lists(st.integers(0, 255), min_size=16, max_size=16))
def test_16_bit_grey_of_an_8_bit_picture_is_that_picture(tmp_path_factory, grey):
    file = tmp_path_factory.getbasetemp() / "x.png"
    grey = np.array(grey, np.uint16).reshape(4, 4)
    Image.fromarray(grey * 257).save(file)
    assert (pixels(file) == grey[..., None]).all()


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_tiff_of_any_depth_byte_order_and_polarity(tmp_path, bits, photometric, order):
    levels = np.linspace(0, 2**bits - 1, 32).astype(np.uint32).reshape(4, 8)
    if bits == 12:
        digits = "".join(f"{level:03x}" for level in levels.flatten())
        data = bytes.fromhex(digits)
    else:
        data = levels.astype(f"{order}u{bits // 8}").tobytes()
    file = tiff(tmp_path / "x.tif", bits, photometric, data, 8, 4, order)
    expected = (levels * (255 / (2**bits - 1))).round()
    try:
        found = pixels(file)[..., 0]
    except ValueError as error:  # Pillow does not read all of them.
        assert bits > 8 and "cannot be read" in str(error)
    else:
        assert (found == (expected if photometric else 255 - expected)).all()


@pytest.mark.parametrize(("bits", "sample_format"), [(16, 2), (32, 1), (32, 2), (32, 3)])
def test_signed_32_bit_and_float_tiff_is_refused(tmp_path, bits, sample_format):
    file = tiff(tmp_path / "x.tif", bits, 1, bytes(4 * 4 * bits // 8), 4, 4, sample_format=sample_format)
    with pytest.raises(ValueError, match=r"x.tif must have 8-bit channels .* got Pillow's mode '[IF]'"):
        read_image(file)


@pytest.mark.parametrize(("depth", "colour"), [(1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (8, 2), (16, 2)])
def test_the_transparent_colour_of_png_becomes_white(tmp_path, depth, colour):
    top = 2**depth - 1
    rows = RANDOM.integers(0, top + 1, (5, 6, 3 if colour == 2 else 1))
    for key in (0, top, top // 3):
        rows[2:4, 1:3] = key
        file = png(tmp_path / "x.png", depth, colour, rows, struct.pack(">H", key) * rows.shape[2])
        deep = (rows / 257).round() if colour == 0 else rows >> 8
        plain = deep if depth == 16 else rows * (255 // top)
        expected = np.where((rows == key).all(2, keepdims=True), 255, plain)
        assert (pixels(file) == expected).all(), key


@pytest.mark.parametrize("transparent", [0, bytes([0, 128, 255])])
def test_transparent_palette_colours_become_white(tmp_path, transparent):
    image = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4) % 3, "L").convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.save(tmp_path / "x.png", transparency=transparent)
    alpha = np.array([0, 255, 255] if transparent == 0 else list(transparent))[np.asarray(image)][..., None]
    assert abs(pixels(tmp_path / "x.png") - over_white(np.asarray(image.convert("RGB")), alpha)).max() <= 1
    if transparent == 0:
        image.save(tmp_path / "x.gif", transparency=0)
        assert (pixels(tmp_path / "x.gif") == pixels(tmp_path / "x.png")).all()


@pytest.mark.parametrize(("mode", "suffix"), [*itertools.product(("LA", "RGBA"), ("png", "tif", "webp"))])
def test_ink_on_a_transparent_ground_keeps_its_shape(tmp_path, mode, suffix):
    alpha = np.arange(256, dtype=np.uint8).reshape(16, 16)
    ink = np.dstack([np.zeros_like(alpha)] * (len(mode) - 1) + [alpha])
    Image.fromarray(ink, mode).save(tmp_path / f"x.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    assert (pixels(tmp_path / f"x.{suffix}") == 255 - alpha[..., None]).all()


@pytest.mark.parametrize("mode", ["LA", "RGBA", "PA"])
def test_colours_behind_an_alpha_channel_of_zeros_are_refused(tmp_path, mode, monkeypatch):
    image = in_mode(mode)[0]
    image.putalpha(0)
    (tmp_path / "x").touch()
    monkeypatch.setattr(Image, "open", lambda file: image)
    with pytest.raises(
        ValueError, match=r"x must have visible pixels, got alpha 0 everywhere .*: save it without alpha"
    ):
        read_image(tmp_path / "x")
    image.putpixel((0, 0), (*image.getpixel((0, 0))[:-1], 255))
    assert (pixels(tmp_path / "x").reshape(-1, 3)[1:] == 255).all()


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_an_empty_drawing_is_white(tmp_path, mode):
    Image.new(mode, (4, 5)).save(tmp_path / "x.png")
    assert (pixels(tmp_path / "x.png") == 255).all()


def test_opaque_pictures_do_not_depend_on_having_an_alpha_channel(tmp_path):
    colour = RANDOM.integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(colour).save(tmp_path / "rgb.png")
    Image.fromarray(colour).convert("RGBA").save(tmp_path / "rgba.png")
    assert (pixels(tmp_path / "rgb.png") == colour).all()
    assert (pixels(tmp_path / "rgba.png") == colour).all()


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", ORIENTED)
def test_exif_orientation_is_applied(tmp_path, suffix, orientation):
    upright = np.kron(np.array([[10, 90, 170], [250, 130, 50]], np.uint8), np.ones((16, 16), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"jpg": {"quality": 100}, "webp": {"lossless": True}}.get(suffix, {})
    Image.fromarray(ORIENTED[orientation](upright).copy()).convert("RGB").save(
        tmp_path / f"x.{suffix}", exif=exif, **options
    )
    found = pixels(tmp_path / f"x.{suffix}")
    np.testing.assert_allclose(found, upright[..., None].repeat(3, 2), rtol=0, atol=2 if suffix == "jpg" else 0)


TIFF_MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "I;16", "I;16B"]
PNG_MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"]


@pytest.mark.parametrize(
    ("mode", "suffix", "options"),
    [(mode, "png", {}) for mode in PNG_MODES]
    + [(mode, "tif", {"compression": method}) for mode in TIFF_MODES for method in (None, "tiff_lzw")],
)
def test_exif_orientation_is_applied_in_every_mode(tmp_path, mode, suffix, options):
    image = in_mode(mode)[0]
    image.save(tmp_path / f"plain.{suffix}", **options)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / f"turned.{suffix}", exif=exif, **options)
    assert (pixels(tmp_path / f"plain.{suffix}") == pixels(tmp_path / f"turned.{suffix}")).all()


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"\0" * 9])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_exif_data_does_not_matter(tmp_path, suffix, exif):
    Image.new("RGB", (8, 6), (200, 200, 200)).save(tmp_path / f"x.{suffix}", exif=exif)
    assert abs(pixels(tmp_path / f"x.{suffix}").astype(int) - 200).max() <= 2


def test_a_bomb_is_refused_with_size_and_limit(tmp_path, monkeypatch):
    Image.new("L", (50, 20)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 499)
    with pytest.raises(ValueError, match=r"image .*x.png must have at most 998 pixels, got 1,000: reduce its size"):
        read_image(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert read_image(tmp_path / "x.png").size == (50, 20)


@given(st.integers(1, 40), st.integers(1, 40))
def test_an_image_of_the_right_size_stays_as_it_is(height, width):
    image = Image.fromarray(np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8))
    assert (centre_crop(image, height, width) == np.asarray(image).transpose(2, 0, 1)).all()


@given(*[st.integers(1, 40)] * 4)
def test_any_image_covers_any_size(height, width, to_height, to_width):
    image = Image.new("RGB", (width, height), (9, 99, 199))
    cropped = centre_crop(image, to_height, to_width)
    assert cropped.shape == (3, to_height, to_width)
    assert (cropped == np.array([9, 99, 199])[:, None, None]).all()


@pytest.fixture
def folder(tmp_path):
    """Three pictures of one size each, with fixed times."""
    (tmp_path / "a").mkdir()
    for index in range(3):
        Image.new("RGB", (8, 8), (index, 50, 90)).save(tmp_path / "a" / f"{index}.bmp")
        os.utime(tmp_path / "a" / f"{index}.bmp", (315532800, 315532800))
    return tmp_path / "a"


def read(folder, image_size=4):
    return decode(sorted(folder.glob("*.*")), image_size, str(folder.parent / "cache"))


def entries(folder):
    return sorted((folder.parent / "cache").iterdir())


def test_files_that_differ_in_their_pixels_only_are_told_apart(folder):
    first = read(folder)
    for file in folder.iterdir():
        before = file.stat()
        data = bytearray(file.read_bytes())
        data[-8 * 8 * 3 :] = bytes([200]) * (8 * 8 * 3)
        file.write_bytes(data)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert file.stat().st_size == before.st_size
    assert (read(folder) == 200).all()
    assert first[:, 1].unique().tolist() == [50]


def test_moved_copied_and_renamed_folders_share_an_entry(folder, monkeypatch):
    first = read(folder)
    shutil.copytree(folder, folder.parent / "copy")
    folder.rename(folder.parent / "moved")
    monkeypatch.setattr(Image, "open", None)
    for name in ("copy", "moved"):
        assert torch.equal(read(folder.parent / name), first)
    assert len(entries(folder)) == 1


def test_order_size_and_version_have_entries_of_their_own(folder, monkeypatch):
    files = sorted(folder.iterdir())
    cache = str(folder.parent / "cache")
    assert torch.equal(decode(files[::-1], 4, cache), decode(files, 4, cache).flip(0))
    assert decode(files, 5, cache).shape == (3, 3, 5, 5)
    monkeypatch.setattr(decoding, "VERSION", decoding.VERSION + 1)
    decode(files, 4, cache)
    assert len(entries(folder)) == 4


def save(array):
    return lambda entry: np.save(entry.open("wb"), array)


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: entry.write_bytes(entry.read_bytes()[:-1]),
        lambda entry: entry.write_bytes(entry.read_bytes()[:100]),
        lambda entry: entry.write_bytes(b""),
        lambda entry: entry.write_bytes(b"PK\x03\x04 something else"),
        lambda entry: np.savez(entry.open("wb"), images=np.zeros((3, 3, 4, 4), np.uint8)),
        save(np.zeros((2, 3, 4, 4), np.uint8)),
        save(np.zeros((3, 4, 4, 3), np.uint8)),
        save(np.zeros((3, 3, 4, 4), np.float32)),
        save(np.asfortranarray(np.zeros((3, 3, 4, 4), np.uint8))),
        save(np.array([{}])),
    ],
)
def test_a_damaged_entry_is_decoded_again(folder, damage):
    first = read(folder).clone()
    (entry,) = entries(folder)
    whole = entry.read_bytes()
    damage(entry)
    assert torch.equal(read(folder), first)
    assert entries(folder) == [entry] and entry.read_bytes() == whole


def test_an_entry_with_any_byte_of_its_header_changed_is_never_taken_for_other_images(folder):
    first = read(folder).clone()
    (entry,) = entries(folder)
    whole = entry.read_bytes()
    assert len(whole) == 128 + first.numel()
    for position in range(128):
        entry.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        assert torch.equal(read(folder), first), position
