"""Images from features and from moments: how close the attacker's decoders come."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from fedlscl.functional.distillation import second_moment
from privacy_sections.moments import closest, guesses
from privacy_sections.reconstruction import Decoder, aligned, conv_decoder, quality, ridge_decoder
from privacy_sections.world import KNOWLEDGE, World

DIRECTIONS = 8
"""Principal directions of a moment that are tried, both ways."""
Row = dict[str, Any]
Change = Callable[[Tensor], Tensor]
"""What is done to a moment before it is sent."""


class Attacker:
    """Decoders for the features of each net, trained on pairs of the attacker's own images.

    Args:
        world: what there is.
        steps: of a convolutional decoder's training.
        victims: images of the client that are attacked.
    """

    def __init__(self, world: World, steps: int, victims: int) -> None:
        self.world, self.steps = world, steps
        self.shadow = world.pools["shadow"].images / 255
        self.images = world.pools["own"].images[:victims] / 255
        self.decoder = cache(self._decoder)

    def _decoder(self, net: str, kind: str, pairs: int) -> Decoder:
        features, images = self.world.features[net, "shadow"][:pairs], self.shadow[:pairs]
        return ridge_decoder(features, images) if kind == "ridge" else conv_decoder(features, images, self.steps)

    def received(self, client: str, net: str) -> Tensor:
        """Features of the images that are attacked; of another net than the attacker's, brought to its scale."""
        sent = self.world.features[client, "own"][: len(self.images)]
        return sent if client == net else aligned(sent, self.world.features[net, "shadow"])

    def mean_image(self, pairs: int) -> Row:
        """The baseline: what the client is like on average, nothing of what it sent."""
        found = self.shadow[:pairs].mean(0).expand_as(self.images)
        return {"knowledge": "none", "decoder": "mean image", "pairs": pairs, **means(found, self.images)}


def from_features(attacker: Attacker, counts: list[int]) -> list[Row]:
    """Reconstructions from raw features by knowledge, decoder and number of pairs."""
    rows = [attacker.mean_image(pairs) for pairs in counts]
    for knowledge, (client, net) in KNOWLEDGE.items():
        sent = attacker.received(client, net)
        for kind, numbers in (("ridge", counts), ("conv", counts[-1:])):
            for pairs in numbers:
                found = attacker.decoder(net, kind, pairs)(sent)
                rows.append({"knowledge": knowledge, "decoder": kind, "pairs": pairs, **means(found, attacker.images)})
    return rows


def from_moments(attacker: Attacker, pairs: int, sizes: list[int], limit: int = 64) -> list[Row]:
    """Reconstructions from moments of ``n`` samples, by n, for who has the net that made the features."""
    return [
        reconstructed(attacker, knowledge, pairs, n, limit)
        for knowledge, (client, net) in KNOWLEDGE.items()
        for n in sizes
        if client == net and n <= len(attacker.images) // 2
    ]


def reconstructed(
    attacker: Attacker,
    knowledge: str,
    pairs: int,
    n: int,
    limit: int,
    changed: Change = lambda c: c,
) -> Row:
    """The best guess for each image, beside the best of as many guesses from another set's moment.

    Choosing by looking at the image is what no attacker can do; it flatters the guesses of the other set as much, so
    that the difference between both is what the moment gives away.
    """
    client, net = KNOWLEDGE[knowledge]
    features = attacker.world.features[client, "own"][: len(attacker.images)]
    centre = attacker.world.features[net, "shadow"].mean(0)
    decode = attacker.decoder(net, "ridge", pairs)
    sets = torch.arange(len(features) // n * n).split(n)[: max(2, limit // n)]
    made = [guesses(changed(second_moment(features[ids]).float()), DIRECTIONS) for ids in sets]
    best, other, cosines = [], [], []
    for i, ids in enumerate(sets):
        images = attacker.images[ids]
        best.append(best_of(decode(made[i]), images))
        other.append(best_of(decode(made[i - 1]), images))
        cosines.append(closest(made[i] - centre, features[ids] - centre))
    psnr, ssim = (torch.cat(part).mean().item() for part in zip(*best, strict=True))
    others_psnr, others_ssim = (torch.cat(part).mean().item() for part in zip(*other, strict=True))
    return {
        "knowledge": knowledge, "n": n, "images": sum(map(len, sets)), "psnr": psnr, "ssim": ssim,
        "other set psnr": others_psnr, "other set ssim": others_ssim, "cosine": torch.cat(cosines).mean().item(),
    }  # fmt: skip


def best_of(found: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """PSNR and SSIM of the reconstruction (k, 3, h, w) that is closest to each image (n, 3, h, w)."""
    nearest = torch.cdist(images.flatten(1), found.flatten(1)).argmin(1)
    return quality(found[nearest], images)


def means(found: Tensor, images: Tensor) -> dict[str, float]:
    """Mean PSNR and SSIM."""
    psnr, ssim = quality(found, images)
    return {"psnr": psnr.mean().item(), "ssim": ssim.mean().item()}


def strip(attacker: Attacker, pairs: int, noisy: Callable[[Tensor], Tensor], number: int = 10) -> dict[str, Tensor]:
    """Rows of pictures: originals, and what the attacker makes of them."""
    sent = {name: attacker.received(*nets)[:number] for name, nets in KNOWLEDGE.items()}
    one = [second_moment(row[None]).float() for row in sent["client's net"]]
    many = guesses(second_moment(attacker.world.features["trained", "own"][:128]).float(), DIRECTIONS)
    decode = {net: attacker.decoder(net, "ridge", pairs) for net in ("start", "imitated", "trained")}
    originals, decoded = attacker.images[:number], decode["trained"](many)
    nearest = torch.cdist(originals.flatten(1), decoded.flatten(1)).argmin(1)
    leading = partial(torch.index_select, dim=0, index=torch.tensor([1]))
    return {
        "original": originals,
        "E, client untrained": decode["start"](sent["untrained"]),
        "E, client's net known": decode["trained"](sent["client's net"]),
        "E, imitation": decode["imitated"](sent["imitation"]),
        "E, public start": decode["start"](sent["public start"]),
        "moment of 1, net known": decode["trained"](torch.cat([guesses(c, 0)[:1] for c in one])),
        "moment of 128, net known": decoded[nearest],
        "moment of 1, noise": decode["trained"](torch.cat([leading(guesses(noisy(c), 0)) for c in one])),
    }
