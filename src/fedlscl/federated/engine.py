"""The only training loop and the only inference loop of the package, on Fabric."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor

from fedlscl.data import Batch, ClientStream
from fedlscl.federated.cache import PrefixCache
from fedlscl.federated.client import Client
from fedlscl.federated.compilation import Compile, compile_small_models
from fedlscl.federated.method import Stage
from fedlscl.federated.parking import Parking
from fedlscl.nets.net import Net


class Engine:
    """Runs stages and nets on Fabric's device in its precision, with frozen prefixes from the cache."""

    def __init__(
        self,
        fabric: Fabric,
        cache: PrefixCache,
        infer_batch_size: int = 128,
        parking: Parking | None = None,
        compile: Compile = "auto",
    ) -> None:
        self.fabric, self.cache, self.infer_batch_size, self.compile = fabric, cache, infer_batch_size, compile
        self.parking = parking or Parking(float("inf"))

    def train(self, stage: Stage, on_batch: Callable[[int], None] = lambda size: None) -> dict[str, float]:
        """Go through a stage's batches; returns the mean of each term of the last epoch."""
        module = stage.module
        self.fabric.to_device(module)
        compile_small_models(module.net, self.compile)
        optimizer: Any = self.fabric.setup_optimizers(module.configure_optimizers())
        module.train()
        means: dict[str, float] = {}
        for _ in range(stage.epochs):
            sums: dict[str, Tensor] = {}
            steps = 0
            for steps, batch in enumerate(stage.batches, start=1):
                placed = self.place(batch, module.net)
                with self.fabric.autocast():
                    terms = module.training_step(placed, steps - 1)
                self.fabric.backward(terms["loss"])
                module.on_before_optimizer_step(optimizer)
                optimizer.step()
                optimizer.zero_grad()
                for name, value in terms.items():
                    sums[name] = sums.get(name, 0) + value.detach()
                on_batch(len(batch.labels))
            means = {name: float(value) / steps for name, value in sums.items()}
        module.eval()
        return means

    @torch.no_grad()
    def infer(
        self, net: Net, stream: ClientStream, ids: Tensor, part: Callable[[Tensor], Any] | None = None
    ) -> Iterator[tuple[Batch, Any]]:
        """Batches on the device with the net's outputs, in evaluation mode and in the order of ``ids``.

        ``part`` computes on images alone what is wanted of the net, such as its small model's features.
        """
        net.eval()
        for batch in stream.loader(ids, self.infer_batch_size, shuffle=False):
            batch = self.fabric.to_device(batch) if part else self.place(batch, net)
            with self.fabric.autocast():
                output = part(batch.images) if part else net(batch.images, batch.prefix)
            yield batch, output

    def place(self, batch: Batch, net: Net) -> Batch:
        """Move a batch to the device and give it the cached output of the net's frozen part."""
        return self.cache.attach(self.fabric.to_device(batch), net, self.fabric.autocast)

    @contextmanager
    def on_device(self, client: Client) -> Iterator[None]:
        """Hold a client's nets on the device for its turn; idle clients wait in host memory, or in a file."""
        self.parking.take(client)
        nets = [net for net in (client.net, client.previous) if net is not None]
        for net in nets:
            self.fabric.to_device(net)
        try:
            yield
        finally:
            if self.fabric.device.type != "cpu":
                for net in filter(None, (client.net, client.previous)):
                    net.cpu()
            self.parking.leave(client)
