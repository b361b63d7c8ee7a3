"""Formula-driven pre-training of `vit_glyph_patch4_32` on procedurally drawn glyphs.

After Kataoka et al., Pre-training without Natural Images, ACCV 2020, with stroke glyphs in place of fractals. A class
is a random prototype of one to four strokes (lines, cubic Bezier curves, elliptical arcs); a sample is its prototype
with jittered control points, a smooth warp, an affine map, and random stroke width, resolution, contrast and noise.
scikit-learn's digits are only read in `report_digits`, after training, and no run was selected on them; but the drawing
has them in view: glyphs are bright on dark, and a third of them are drawn on 8 x 8 pixels.

    PYTHONPATH=src python benchmarks/pretrain_glyph_vit.py
"""

import argparse
import copy
import functools
import hashlib
import json
import math
import platform
import sys
import time
from pathlib import Path
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.layers import build_sincos2d_pos_embed, set_fused_attn
from torch import Generator, Tensor, nn

from fedlscl.nets.vit import GLYPH_WEIGHTS

SIZE = 32
MAX_STROKES = 4
SEGMENTS = 32
PEAK = 3e-3
"""Learning rate after the warm-up; a cosine takes it to zero."""
GROWTH = (0.6, 0.8)
"""Shares of the steps after which the number of blocks doubles."""
FULL_VIEW = 0.95
"""Share of the steps after which no patch is dropped."""
RESULTS = Path(__file__).parent / "results" / "glyph_vit.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--classes", type=int, default=1000, help="glyph classes to train on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=GLYPH_WEIGHTS, help="weights; the report goes beside them if set")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    # The fused kernel's bf16 backward is several times slower than plain attention on a CPU.
    set_fused_attn(device == "cuda")
    torch.manual_seed(args.seed)
    generator = Generator(device).manual_seed(args.seed)
    glyphs = draw_glyphs(args.classes, generator)
    net = timm.create_model("vit_glyph_patch4_32", num_classes=args.classes, patch_drop_rate=0.5).to(device)
    initialise(net)

    start, start_cpu = time.perf_counter(), time.process_time()
    train(net, glyphs, args.steps, args.batch_size, generator)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu

    weights = {name: value.half().cpu() for name, value in net.state_dict().items() if not name.startswith("head.")}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, args.out)
    shipped = timm.create_model("vit_glyph_patch4_32", num_classes=0).to(device).eval()
    shipped.load_state_dict(load_file(args.out), strict=True)
    report = {
        "command": " ".join(["python", "benchmarks/pretrain_glyph_vit.py", *sys.argv[1:]]),
        "seed": args.seed,
        "steps": args.steps,
        "batch_size": args.batch_size,
        "classes": args.classes,
        "seconds": round(seconds),
        "cpu_seconds": round(cpu_seconds),
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in shipped.parameters()),
        **report_glyphs(shipped, net.head, glyphs, generator),
        **report_digits(shipped, args.seed),
        "sha256": hashlib.sha256(args.out.read_bytes()).hexdigest(),
    }
    results = RESULTS if args.out == GLYPH_WEIGHTS else args.out.with_suffix(".json")
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


class Glyphs(NamedTuple):
    """Prototypes: stroke s of class c passes through the points basis[c, s] @ control[c, s]."""

    basis: Tensor
    """(classes, MAX_STROKES, SEGMENTS + 1, 4); each row sums to one, so that moving the controls moves the stroke."""
    control: Tensor
    """(classes, MAX_STROKES, 4, 2), as (x, y); a glyph fills [-1, 1] in its longer direction."""
    present: Tensor
    """(classes, MAX_STROKES), one or zero."""


def draw_glyphs(num_classes: int, generator: Generator) -> Glyphs:
    """Draw random prototypes; every second class shares all but its first stroke with the class before it."""
    device, shape = generator.device, (num_classes, MAX_STROKES)

    def uniform(low: float, high: float, *size: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, *size, generator=generator, device=device)

    t = torch.linspace(0, 1, SEGMENTS + 1, device=device)
    bernstein = torch.stack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], -1)
    angle = uniform(0, 2 * math.pi, 1) + t * uniform(0.5 * math.pi, 2 * math.pi, 1) * uniform(-1, 1, 1).sign()
    cos, sin = angle.cos(), angle.sin()
    arc_basis = torch.stack([1 - cos - sin, cos, sin, torch.zeros_like(cos)], -1)
    radius_x, radius_y = torch.diag_embed(uniform(0.25, 0.8, 2)).unbind(-2)
    centre = uniform(-0.5, 0.5, 2)
    arc = torch.stack([centre, centre + radius_x, centre + radius_y, centre], -2)
    curve = uniform(-1, 1, 4, 2)
    line = torch.lerp(curve[..., :1, :], curve[..., 3:, :], torch.linspace(0, 1, 4, device=device)[:, None])

    kind = uniform(0, 1, 1, 1)
    basis = torch.where(kind < 0.35, arc_basis, bernstein)
    control = torch.where(kind < 0.35, arc, torch.where(kind < 0.6, line, curve))
    share = torch.tensor([0.1, 0.4, 0.35, 0.15], device=device)
    num_strokes = 1 + torch.multinomial(share, num_classes, replacement=True, generator=generator)
    present = (torch.arange(MAX_STROKES, device=device) < num_strokes[:, None]).float()
    joined, where = uniform(0, 1) < 0.6, (uniform(0, 1) * SEGMENTS).round().long()

    twins = num_classes // 2 * 2
    for part in (basis, control, present, joined, where):
        part[1:twins:2, 1:] = part[0:twins:2, 1:]

    every = torch.arange(num_classes, device=device)
    for stroke in range(1, MAX_STROKES):
        points = basis[:, stroke - 1] @ control[:, stroke - 1]
        gap = points[every, where[:, stroke]] - (basis[:, stroke, :1] @ control[:, stroke])[:, 0]
        control[:, stroke] += (gap * joined[:, stroke, None])[:, None]

    points, absent = basis @ control, present[..., None, None] == 0
    low = points.masked_fill(absent, math.inf).amin((1, 2))
    high = points.masked_fill(absent, -math.inf).amax((1, 2))
    half_extent = ((high - low) / 2).amax(-1)
    control = (control - ((low + high) / 2)[:, None, None]) / half_extent[:, None, None, None]
    return Glyphs(basis, control, present)


def render(glyphs: Glyphs, labels: Tensor, generator: Generator) -> Tensor:
    """Draw one new sample of each class in `labels`: (B,) -> (B, 3, SIZE, SIZE) in [0, 1]."""
    device, batch = generator.device, len(labels)

    def uniform(low: float, high: float, *size: int) -> Tensor:
        return low + (high - low) * torch.rand(batch, *size, generator=generator, device=device)

    def normal(*size: int) -> Tensor:
        return torch.randn(batch, *size, generator=generator, device=device)

    control = glyphs.control[labels] + uniform(0, 0.12, 1, 1, 1) * normal(MAX_STROKES, 4, 2)
    points = (glyphs.basis[labels] @ control).flatten(1, 2)
    points = points + uniform(0, 0.12, 1, 1) * torch.sin(1.5 * points @ normal(2, 2) + uniform(0, 2 * math.pi, 1, 2))
    turn, shear = 0.2 * normal(1), 0.2 * normal(1)
    scale = 13 * uniform(0.65, 1.1, 1) * torch.exp(0.15 * normal(2))
    x = scale[:, :1] * (turn.cos() * points[..., 0] - (turn.sin() - shear) * points[..., 1])
    y = scale[:, 1:] * (turn.sin() * points[..., 0] + turn.cos() * points[..., 1])
    points = torch.stack([x, y], -1) + (SIZE - 1) / 2 + 1.5 * normal(1, 2)

    ink = stroke_ink(points.unflatten(1, (MAX_STROKES, -1)), glyphs.present[labels], uniform(0.8, 2.2, 1))
    ink = torch.sigmoid(uniform(6, 16, 1, 1) * (ink - 0.5))

    resolution = torch.where(uniform(0, 1) < 0.35, torch.full_like(labels, 8), uniform(8, SIZE).round().long())
    noise = uniform(0, 0.1, 1, 1) * (SIZE / resolution)[:, None, None] * normal(SIZE, SIZE)
    resample = resampling_matrices().to(device)[resolution]
    ink = resample.mT @ (ink + noise) @ resample
    image = uniform(0, 0.2, 1, 1) + uniform(0.6, 1, 1, 1) * ink
    return image.clamp(0, 1)[:, None].expand(-1, 3, -1, -1)


def stroke_ink(points: Tensor, present: Tensor, sigma: Tensor) -> Tensor:
    """Integrate a Gaussian pen along polylines: about one on a stroke, one half at 1.18 sigma from its middle.

    A Gaussian of the plane is a product of two of the line, so that a glyph costs one matrix product.

    Args:
        points: (B, strokes, SEGMENTS + 1, 2) in pixels.
        present: (B, strokes), the weight of each stroke.
        sigma: (B, 1), radius of the pen in pixels.
    """
    steps = points.diff(dim=-2)
    mass = (steps.norm(dim=-1) * present[..., None]).flatten(1) / (math.sqrt(2 * math.pi) * sigma)
    middle = (points[..., :-1, :] + steps / 2).flatten(1, 2)
    grid = torch.arange(SIZE, device=points.device)
    offset = (middle[..., None] - grid) / sigma[..., None, None]
    x, y = torch.exp(-0.5 * offset**2).unbind(2)
    return (y * mass[..., None]).mT @ x


@functools.cache
def resampling_matrices() -> Tensor:
    """(SIZE + 1, SIZE, SIZE): entry r averages a line down to r pixels and interpolates it back up, linearly."""
    line = torch.eye(SIZE)[None]
    there_and_back = [
        F.interpolate(F.adaptive_avg_pool1d(line, max(r, 1)), size=SIZE, mode="linear")[0] for r in range(SIZE + 1)
    ]
    return torch.stack(there_and_back)


def train(net: nn.Module, glyphs: Glyphs, steps: int, batch_size: int, generator: Generator) -> None:
    """Classify endless new renderings and sketch their prototypes, both from the CLS features.

    The sketch is a regression: it tells similar glyphs from different ones long before the classes are told apart.
    The net starts with few blocks and is deepened twice (GROWTH); half of the patches are dropped until FULL_VIEW.
    """
    device = generator.device
    targets = sketches(glyphs)
    sketch = nn.Linear(net.num_features, targets.shape[1]).to(device)
    net.blocks = net.blocks[: len(net.blocks) // 2 ** len(GROWTH)]
    optimizer, since = adamw([net, sketch]), 0
    start = time.perf_counter()
    net.train()
    for step in range(steps):
        if step in [round(share * steps) for share in GROWTH]:
            net.blocks = deepened(net.blocks)
            optimizer, since = adamw([net, sketch]), step
        if step == round(FULL_VIEW * steps):
            net.patch_drop.prob = 0.0
        warmup = min(1.0, (step - since + 1) / max(1, steps // 50))
        for group in optimizer.param_groups:
            group["lr"] = PEAK * warmup * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        labels = torch.randint(len(targets), (batch_size,), generator=generator, device=device)
        images = render(glyphs, labels, generator)
        with torch.autocast(device.type, torch.bfloat16):
            features = net.forward_head(net.forward_features((images - 0.5) / 0.5), pre_logits=True)
            logits, drawn = net.head(features).float(), sketch(features).float()
        loss = F.cross_entropy(logits, labels) + F.mse_loss(drawn, targets[labels])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 49:
            accuracy = (logits.argmax(1) == labels).float().mean()
            clock = time.perf_counter() - start
            print(f"step {step + 1}: loss {loss:.3f} accuracy {accuracy:.3f} after {clock:.0f} s", flush=True)
    net.eval()


@torch.no_grad()
def initialise(net: nn.Module) -> None:
    """Give patches a visible position and blocks a scale that fits their width: timm's 0.02 suits wider nets."""
    net.pos_embed[:, 1:] = build_sincos2d_pos_embed([8, 8], dim=net.embed_dim, temperature=100.0)
    for module in net.blocks.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)


@torch.no_grad()
def deepened(blocks: nn.Sequential) -> nn.Sequential:
    """Follow each block by its copy, both with half of its residuals, which about keeps the function computed."""
    for block in blocks:
        for last in (block.attn.proj, block.mlp.fc2):
            last.weight.mul_(0.5)
            last.bias.mul_(0.5)
    return nn.Sequential(*(twin for block in blocks for twin in (block, copy.deepcopy(block))))


def adamw(nets: list[nn.Module]) -> torch.optim.AdamW:
    """AdamW that decays matrices only."""
    parameters = [p for net in nets for p in net.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def sketches(glyphs: Glyphs) -> Tensor:
    """Prototypes drawn plainly on 8 x 8 pixels, (classes, 64); each pixel has mean zero and variance one."""
    points = glyphs.basis @ glyphs.control * 13 + (SIZE - 1) / 2
    sigma = torch.full_like(points[:, 0, 0, :1], 1.5)
    ink = torch.sigmoid(10 * (stroke_ink(points, glyphs.present, sigma) - 0.5))
    pixels = F.avg_pool2d(ink[:, None], SIZE // 8).flatten(1)
    return (pixels - pixels.mean(0)) / pixels.std(0).clamp(min=1e-3)


def report_glyphs(net: nn.Module, head: nn.Module, glyphs: Glyphs, generator: Generator) -> dict[str, float]:
    """Accuracy on new renderings of the training classes, and of class means on 100 classes never trained."""
    labels = torch.randint(len(glyphs.control), (2048,), generator=generator, device=generator.device)
    logits = head(features_of(net, render(glyphs, labels, generator)))
    labels_novel = torch.arange(100, device=generator.device).repeat(20)
    features = features_of(net, render(draw_glyphs(100, generator), labels_novel, generator))
    novel_accuracy = nearest_class_mean(features[:1000], labels_novel[:1000], features[1000:], labels_novel[1000:])
    return {
        "held_out_accuracy": round((logits.argmax(1) == labels).float().mean().item(), 4),
        "novel_classes_ncm": round(novel_accuracy, 4),
    }


def report_digits(net: nn.Module, seed: int) -> dict[str, float]:
    """Nearest class mean and ridge on scikit-learn's digits (70/30 split), of frozen features and of raw pixels."""
    from sklearn.datasets import load_digits
    from sklearn.linear_model import RidgeClassifier
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]
    images = F.interpolate(images, size=SIZE, mode="bilinear").expand(-1, 3, -1, -1)
    features = features_of(net, images.to(next(net.parameters()).device)).cpu()
    report = {}
    for name, inputs in {"digits": features, "digits_pixels": torch.tensor(digits.data, dtype=torch.float32)}.items():
        split = train_test_split(inputs, digits.target, test_size=0.3, stratify=digits.target, random_state=seed)
        train_inputs, test_inputs, train_labels, test_labels = (torch.as_tensor(part) for part in split)
        ridge = RidgeClassifier(alpha=1.0).fit(train_inputs, train_labels)
        ncm = nearest_class_mean(train_inputs, train_labels, test_inputs, test_labels)
        report[f"{name}_ncm"] = round(ncm, 4)
        report[f"{name}_ridge"] = round(ridge.score(test_inputs, test_labels), 4)
    return report


@torch.no_grad()
def features_of(net: nn.Module, images: Tensor) -> Tensor:
    """CLS features, (N, 3, SIZE, SIZE) in [0, 1] -> (N, 80)."""
    return torch.cat([net((part - 0.5) / 0.5) for part in images.split(512)])


def nearest_class_mean(train_inputs: Tensor, train_labels: Tensor, inputs: Tensor, labels: Tensor) -> float:
    """Accuracy of assigning each input to the nearest class mean; labels are 0 .. classes - 1."""
    means = torch.stack([train_inputs[train_labels == c].mean(0) for c in range(int(train_labels.max()) + 1)])
    return (torch.cdist(inputs, means).argmin(1) == labels).float().mean().item()


def cpu_name() -> str:
    """Processor and number of threads, e.g. 'Intel(R) Xeon(R) Processor, 2 threads'."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{(models or [platform.machine()])[0]}, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
