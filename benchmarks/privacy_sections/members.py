"""Membership inference on everything that carries features out of a client, without noise."""

from typing import Any

from privacy_sections.membership import Population, attack, of_features, of_mean, of_moment, with_one
from privacy_sections.world import KNOWLEDGE, World

SENT = {
    "second moment of E": (of_moment, KNOWLEDGE),
    "raw E": (of_features, KNOWLEDGE),
    "Gram matrix of the frozen ViT": (of_moment, {"frozen ViT": ("vit", "vit")}),
    "class sum of the frozen ViT": (of_mean, {"frozen ViT": ("vit", "vit")}),
}
"""What is sent, the scores that are tried on it, and who knows which net."""


def members(world: World, sizes: dict[int, int]) -> list[dict[str, Any]]:
    """AUC by what is sent, what the attacker knows, and the number of samples; ``sizes`` has sets by number."""
    rows = []
    for what, (scores, knowledge) in SENT.items():
        for name, (client, net) in knowledge.items():
            sent, seen, others = (
                with_one(world.features[place])
                for place in ((client, "own"), (net, "own"), (net, "others"))
            )  # fmt: skip
            population = Population(with_one(world.features[net, "shadow"]))
            for n, repeats in sizes.items():
                told = attack(sent, seen, others, population, n, repeats, scores)
                rows.append({"sent": what, "knowledge": name, "n": n, "sets": repeats, **told})
    return rows
