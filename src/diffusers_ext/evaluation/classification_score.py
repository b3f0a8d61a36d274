"""Classification accuracy score: a classifier is trained on samples alone and tested on real images.

Ravuri and Vinyals, arXiv 1905.10887, with a ResNet-50 on ImageNet; so do Ho et al., arXiv 2106.15282. What a model
never draws, or draws under the wrong class, its classifier cannot know. Here the network is a small ResNet of
transformers, as the caller's images are small; a score is comparable only with scores of the same network, training
and number of images, and beside that of a classifier that was trained on as many real images.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from .prompt_following import Share, share


@dataclass(frozen=True)
class ClassificationScore:
    """How often a classifier is right.

    Args:
        top_1: Share of images whose class it ranks first.
        top_5: Share of images whose class is among the first five.
        by_class: `top_1` of the images of each class, in order; without trials where no image is of the class.
    """

    top_1: Share
    top_5: Share
    by_class: list[Share]


def train_classifier(
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    steps: int = 600,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    widths: tuple[int, ...] = (32, 64, 128),
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> torch.nn.Module:
    """A ResNet that was trained from scratch on these images alone.

    Args:
        images: (n, 3, h, w) in [0, 1], sides of at least 16 pixels.
        labels: Integers (n,).
        num_classes: Of the data.
        steps: Of AdamW, with a cosine schedule.
        batch_size: Images of a step, drawn from a shuffled list.
        learning_rate: The largest one.
        widths: Of the ResNet's levels; one residual block each, of two convolutions.
        seed: Of weights and order. The score is a function of it.
        on_step: Is told each step and its loss.

    Raises:
        ValueError: For labels that do not pair up with the images, or lie outside the classes.
    """
    from transformers import ResNetConfig, ResNetForImageClassification

    _check(images, labels, num_classes)
    options: dict[str, Any] = {"num_labels": num_classes}  # of every config; its own signature does not say so
    config = ResNetConfig(
        embedding_size=widths[0], hidden_sizes=list(widths), depths=[1] * len(widths), layer_type="basic", **options
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network: Any = ResNetForImageClassification(config)
    network = network.to(images.device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator, order = Generator().manual_seed(seed), torch.empty(0, dtype=torch.int64)
    with torch.enable_grad():
        for step in range(steps):
            while len(order) < batch_size:
                order = torch.cat([order, torch.randperm(len(images), generator=generator)])
            rows, order = order[:batch_size].to(images.device), order[batch_size:]
            loss = F.cross_entropy(network(2 * images[rows] - 1).logits, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if on_step is not None:
                on_step(step, float(loss.detach()))
    return network.eval()


@torch.no_grad()
def classification_score(network: torch.nn.Module, images: Tensor, labels: Tensor) -> ClassificationScore:
    """What a classifier of `train_classifier` says about real images.

    Args:
        network: The classifier.
        images: (n, 3, h, w) in [0, 1].
        labels: Integers (n,).
    """
    logits = torch.cat([network(2 * some - 1).logits for some in images.split(256)])
    num_classes = logits.shape[1]
    _check(images, labels, num_classes)
    ranked = logits.topk(min(5, num_classes), dim=1).indices == labels[:, None]
    first = ranked[:, 0]
    return ClassificationScore(
        top_1=share(first.tolist()),
        top_5=share(ranked.any(dim=1).tolist()),
        by_class=[share(first[labels == number].tolist()) for number in range(num_classes)],
    )


def _check(images: Tensor, labels: Tensor, num_classes: int) -> None:
    if images.ndim != 4 or tuple(labels.shape) != (len(images),) or not len(images):
        raise ValueError(
            f"`images` has shape {tuple(images.shape)} and `labels` {tuple(labels.shape)}: they must be (n, 3, h, w) "
            "and (n,), with at least one image."
        )
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise ValueError(
            f"`labels` go from {int(labels.min())} to {int(labels.max())}: they must lie between 0 and "
            f"{num_classes - 1}, as there are {num_classes} classes."
        )
