"""One-by-One Distillation: the closed form against Adam on the same objective (Eq. 5)."""

import time

import torch
from torch import Tensor

from fedlscl.functional.distillation import Sums, client_terms, one_by_one_distill, second_moment

from .clock import side_by_side

CLIENTS, FEATURES, LORA, SAMPLES = 5, 512, 12_288, 800
STEPS, LAMBDA = 500, 1.0
RATES = (1e-3,)


def measure() -> list[dict]:
    """Seconds for all clients and the objective of the first one's answer.

    Adam gets the exact gradient of the objective in its cheapest form, two products with (p, p) per step, in float32,
    at the paper's learning rate; a server that holds raw features pays more for every step.
    """
    generator = torch.Generator().manual_seed(0)
    features = [
        torch.nn.functional.normalize(torch.randn(SAMPLES, FEATURES, generator=generator)) for _ in range(CLIENTS)
    ]
    generators = [0.05 * torch.randn(FEATURES + 1, LORA, generator=generator) for _ in range(CLIENTS)]
    moments = [second_moment(e) for e in features]
    closed = side_by_side({"closed": lambda: one_by_one_distill(generators, moments, LAMBDA)}, 3, 1)["closed"]
    answer = one_by_one_distill(generators, moments, LAMBDA)[0]
    problem = Problem(generators, moments)
    by_adam = {lr: problem.adam(lr) for lr in RATES}
    lr = min(by_adam, key=lambda rate: by_adam[rate][1])
    seconds, objective = by_adam[lr]
    row = {
        "clients": CLIENTS, "feature_dim": FEATURES, "lora_dim": LORA,
        "closed_seconds": closed.seconds, "adam_seconds_one_client": seconds, "adam_seconds": CLIENTS * seconds,
        "adam_steps": STEPS, "adam_lr": lr, "ratio": CLIENTS * seconds / closed.seconds,
        "closed_objective": problem.objective(answer), "adam_objective": objective,
        "start_objective": problem.objective(generators[0]), "others": closed.others,
    }  # fmt: skip
    return [row]


class Problem:
    """Eq. 5 of the first client: sum_j tr((Phi - Phi_j)^T C_j (Phi - Phi_j)) + lambda ||Phi - Phi_1||^2."""

    def __init__(self, generators: list[Tensor], moments: list[Tensor]) -> None:
        self.generators, self.moments = generators, moments
        terms = [client_terms(phi, c) for phi, c in zip(generators, moments, strict=True)]
        self.others = Sums(*map(torch.sub, map(sum, zip(*terms, strict=True)), terms[0]))
        self.scale = LAMBDA * self.others.moments.diagonal().mean().item()

    def objective(self, phi: Tensor) -> float:
        """Its value at Phi (p, lora_dim), in float64."""
        phi, total = phi.double(), 0.0
        for other, moment in zip(self.generators[1:], self.moments[1:], strict=True):
            gap = phi - other.double()
            total += (gap * (moment @ gap)).sum().item()
        return total + self.scale * (phi - self.generators[0].double()).square().sum().item()

    def adam(self, lr: float) -> tuple[float, float]:
        """Seconds and the objective after all steps."""
        phi, start = self.generators[0].clone(), self.generators[0]
        moments, products = (part.float() for part in self.others)
        optimizer = torch.optim.Adam([phi], lr=lr, fused=True)
        began = time.perf_counter()
        for _ in range(STEPS):
            phi.grad = 2 * (moments @ phi - products + self.scale * (phi - start))
            optimizer.step()
        return time.perf_counter() - began, self.objective(phi)
