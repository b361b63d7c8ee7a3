"""Our nets in your own Fabric loop: two clients, the frozen part computed once, and Eq. 5 at the end.

Run it with ``python examples/fabric_loop.py``; it takes seconds and needs no download.
"""

import torch
from lightning.fabric import Fabric
from torch import Tensor

from fedlscl import Collaborator, CollaboratorConfig, FoundationConfig, SpatialTemporalDataModule, one_by_one_distill
from fedlscl.functional.distillation import second_moment
from fedlscl.functional.objectives import cross_entropy
from fedlscl.nets.net import freeze_batch_norm

CONFIG = CollaboratorConfig(
    foundation=FoundationConfig(name="vit_glyph_patch4_32", weights="bundled"),
    small_model="test_resnet",
    small_image_size=32,
    blocks=[9],
)


def train(fabric: Fabric, net: Collaborator, images: Tensor, labels: Tensor) -> list[float]:
    """Eq. 3 for one client; blocks before the adapted one run once per image, not once per epoch."""
    classes = labels.unique()
    with torch.no_grad():
        prefix = torch.cat([net.frozen_prefix(part) for part in images.split(128)])
        net.head.imprint(*class_means(net, images, labels, prefix))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-4)
    model, optimizer = fabric.setup(net, optimizer)
    net.train()
    freeze_batch_norm(net)  # so that features mean the same in training, at test and on both clients
    losses = []
    for _ in range(3):
        for rows in torch.randperm(len(labels)).split(32):
            loss = cross_entropy(model(images[rows], prefix[rows]).logits, labels[rows], classes)
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


def class_means(net: Collaborator, images: Tensor, labels: Tensor, prefix: Tensor) -> tuple[Tensor, Tensor]:
    """Classes (C,) and their mean features (C, width), at which the rows of the head start."""
    tokens = torch.nn.functional.normalize(net.eval()(images, prefix).tokens)
    classes = labels.unique()
    return classes, torch.stack([tokens[labels == label].mean(0) for label in classes])


@torch.no_grad()
def accuracy(net: Collaborator, images: Tensor, labels: Tensor) -> float:
    """Accuracy among the classes of ``labels``."""
    classes = labels.unique()
    answers = classes[net.eval()(images).logits[:, classes].argmax(1)]
    return float((answers == labels).float().mean())


def main() -> dict[str, float]:
    """One task of two clients."""
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.seed_everything(42, verbose=False)
    data = SpatialTemporalDataModule(
        dataset="digits",
        num_clients=2,
        num_tasks=1,
        private_classes=3,
        public_classes=2,
        train_per_class=40,
        test_per_class=20,
    )
    found, nets, moments = {}, [], []
    for client in range(2):
        stream = data.stream(client)
        train_batch, test_batch = data.fetch(stream.train_ids(0)), data.fetch(stream.test_ids(0))
        torch.manual_seed(42)  # all clients start from the same weights
        net = Collaborator(CONFIG, data.num_classes)
        losses = train(fabric, net, train_batch.images, train_batch.labels)
        found |= {f"client {client}, first loss": losses[0], f"client {client}, last loss": losses[-1]}
        found[f"client {client}, accuracy"] = accuracy(net, test_batch.images, test_batch.labels)
        with torch.no_grad():
            moments.append(second_moment(net.generate(train_batch.images)[0]))
        nets.append(net)

    # The server (Eq. 5): each client gets its own generator, which also reproduces the other's.
    fused = one_by_one_distill([net.generator.matrix for net in nets], moments, lambda_proximal=1.0)
    for client, (net, generator) in enumerate(zip(nets, fused, strict=True)):
        net.generator.load_matrix(generator)
        test_batch = data.fetch(data.stream(client).test_ids(0))
        found[f"client {client}, accuracy after Eq. 5"] = accuracy(net, test_batch.images, test_batch.labels)
    return found


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name:34} {value:.3f}")
