"""A model's accuracy on images, each counted once at any number of processes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric, SumMetric
from torchmetrics.classification import MulticlassAccuracy

from superblock.training.data import batches
from superblock.training.log import Log, duration


@dataclass(frozen=True)
class Metrics:
    """Mean loss, accuracies in per cent, how many images were looked at, and how long that took.

    With fewer than five classes ``acc5`` is the accuracy of as many guesses as there are classes.
    """

    loss: float
    acc1: float
    acc5: float
    images: int
    seconds: float

    @property
    def images_per_second(self) -> float:
        """Over all processes."""
        return self.images / max(self.seconds, 1e-9)


def evaluate(
    model: nn.Module,
    loader: DataLoader[Any],
    device: torch.device | str = "cpu",
    *,
    classes: int | None = None,
    label_smoothing: float = 0.0,
    amp: bool = False,
    dtype: torch.dtype = torch.float32,
    log: Log | None = None,
    name: str = "",
) -> Metrics:
    """Measure ``model`` in eval mode; in a process group, over the images of all processes.

    Args:
        model: on ``device``; its mode is as before afterwards.
        loader: batches of images and labels.
        device: where the model is.
        classes: how many the model tells apart; by default as many outputs as it has.
        label_smoothing: of the loss.
        amp: compute under autocast.
        dtype: of the images.
        log: prints progress, and the result, first the two lines of the reference script.
        name: what is evaluated, said in these lines: ``EMA``.
    """
    device = torch.device(device)
    log = log or Log(quiet=True)
    header = f"Test: {name}"
    start = time.perf_counter()
    meters: _Meters | None = None if classes is None else _Meters(classes, device)
    steps = len(loader)
    with _eval_mode(model), torch.inference_mode(), autocast(device, amp):
        tracked = log.track(batches(loader, device), header.strip(), steps, loader.batch_size or 1)
        for images, labels in tracked:
            logits = model(images.to(dtype)).float()
            meters = meters or _Meters(logits.shape[1], device)
            meters.loss.update(F.cross_entropy(logits, labels, label_smoothing=label_smoothing), len(labels))
            meters.top1.update(logits, labels)
            meters.top5.update(logits, labels)
            meters.images.update(len(labels))
    meters = meters or _Meters(2, device)
    result = Metrics(
        loss=float(meters.loss.compute()),
        acc1=100 * float(meters.top1.compute()),
        acc5=100 * float(meters.top5.compute()),
        images=int(meters.images.compute()),
        seconds=time.perf_counter() - start,
    )
    log.line(f"{header} Total time: {duration(result.seconds)}")
    log.line(f"{header} Acc@1 {result.acc1:.3f} Acc@5 {result.acc5:.3f}")
    log.line(f"{header} Loss {result.loss:.4f} over {result.images} images, {result.images_per_second:.0f} images/s")
    return result


def autocast(device: torch.device, enabled: bool) -> torch.autocast:
    """Mixed precision: float16 on a GPU, bfloat16 on the CPU."""
    return torch.autocast(
        device.type, dtype=torch.float16 if device.type == "cuda" else torch.bfloat16, enabled=enabled
    )


class _Meters:
    def __init__(self, classes: int, device: torch.device) -> None:
        self.loss = MeanMetric().to(device)
        self.top1 = MulticlassAccuracy(classes, top_k=1, average="micro").to(device)
        self.top5 = MulticlassAccuracy(classes, top_k=min(5, classes), average="micro").to(device)
        self.images = SumMetric().to(device)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
