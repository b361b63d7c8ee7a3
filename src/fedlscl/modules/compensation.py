"""GLFC's local objective: gradient compensation and relation distillation (arXiv 2203.11473, Eq. 2-6)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedlscl.data.batch import Batch
from fedlscl.modules.learner import Learner
from fedlscl.nets.net import Frozen, Net
from fedlscl.objectives import compensation_weights


class CompensationModule(Learner):
    """Weighted binary cross-entropy, and the same against the previous model's answers about old classes."""

    columns: Tensor
    new: Tensor | None
    is_old: Tensor

    def __init__(
        self,
        net: Net,
        columns: Tensor,
        new: Tensor | None = None,
        previous: Net | None = None,
        old: Tensor | None = None,
        **optimisation: Any,
    ) -> None:
        """The objective of a round.

        Args:
            net: is trained.
            columns: classes that take part, (C,) sorted; every label is among them.
            new: classes of the current task where there is a memory beside them; all samples weigh 1 where not given.
            previous: the old model, where there is one; both terms then have weight 1/2.
            old: classes whose targets are its answers, a part of ``columns``.
            optimisation: Learner's lr and so on.
        """
        super().__init__(net, **optimisation)
        self.previous = None if previous is None else Frozen(previous)
        self.register_buffer("columns", columns, persistent=False)
        self.register_buffer("new", new, persistent=False)
        self.register_buffer("is_old", torch.isin(columns, columns[:0] if old is None else old), persistent=False)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Compensation alone, or the mean of compensation and relation."""
        logits = self.net(batch.images, batch.prefix).trained.float()
        targets = (batch.labels[:, None] == self.columns).to(logits)
        compensation = F.binary_cross_entropy_with_logits(
            logits[:, self.columns], targets, self._weights(batch, logits)
        )
        if self.previous is None:
            return {"compensation": compensation}
        answers = self.previous(batch.images, batch.prefix).trained.float()[:, self.columns].sigmoid()
        soft = torch.where(self.is_old, answers, targets)
        relation = F.binary_cross_entropy_with_logits(logits[:, self.columns], soft)
        return {"compensation": compensation / 2, "relation": relation / 2}

    def _weights(self, batch: Batch, logits: Tensor) -> Tensor | None:
        if self.new is None:
            return None
        return compensation_weights(logits, batch.labels, torch.isin(batch.labels, self.new))[:, None]
