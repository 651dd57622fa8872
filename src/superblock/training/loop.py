"""One pass over the training images."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from superblock.errors import TrainingError
from superblock.training.average import update_average
from superblock.training.config import TrainConfig
from superblock.training.data import batches
from superblock.training.distributed import World, smallest, summed
from superblock.training.evaluation import autocast
from superblock.training.log import Log
from superblock.training.ramp import Ramp
from superblock.training.samplers import TrainSampler

NEVER = 2**62


@dataclass
class Learner:
    """All that changes while a model trains: ``model`` as it is, ``wrapped`` as the processes share it."""

    model: nn.Module
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: AveragedModel | None = None
    ramp: Ramp | None = None


@dataclass(frozen=True)
class EpochResult:
    """Mean loss and accuracy (per cent) over an epoch's images, and its speed over all processes."""

    loss: float
    acc1: float
    images_per_second: float


@dataclass(frozen=True)
class Plan:
    """How the images of an epoch divide into steps.

    ``total`` images count, in ``steps`` steps of ``batch`` images over all processes; an update follows every
    ``accumulation`` steps and the last one.
    """

    total: int
    batch: int
    steps: int
    accumulation: int

    def images(self, step: int) -> int:
        """How many images of all processes count in a step."""
        return max(0, min(self.batch, self.total - step * self.batch))

    def images_of_update(self, step: int) -> int:
        """How many images the update that ``step`` belongs to averages over."""
        first = step - step % self.accumulation
        return sum(self.images(other) for other in range(first, min(first + self.accumulation, self.steps)))

    @property
    def updates(self) -> int:
        """How many updates an epoch has."""
        return math.ceil(self.steps / self.accumulation)

    def updates_after(self, step: int) -> bool:
        """Whether the weights move after this step."""
        return (step + 1) % self.accumulation == 0 or step + 1 == self.steps


def train_epoch(
    learner: Learner, loader: DataLoader[Any], config: TrainConfig, world: World, epoch: int, log: Log
) -> EpochResult:
    """Train for one epoch.

    The gradient of an update is the mean over its images, whichever process and step they fell to; images that only
    fill up the last round of processes do not count.

    Raises:
        TrainingError: the loss is no longer finite; says the step.
    """
    sampler = loader.sampler
    assert isinstance(sampler, TrainSampler)  # By `train_loader`.
    plan = Plan(sampler.total, config.data.batch_size * world.size, len(loader), config.accumulation_steps)
    watch = _Watch(epoch, plan.steps, config, world)
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)
    start = time.perf_counter()
    learner.wrapped.train()
    learner.optimizer.zero_grad()
    if learner.ramp is not None:
        learner.ramp.begin_epoch(epoch, plan.updates)
    tracked = log.track(batches(loader, world.device), f"Epoch: [{epoch}]", plan.steps, plan.batch)
    for step, (images, targets) in enumerate(tracked):
        places = (step * config.data.batch_size + torch.arange(len(images))) * world.size + world.rank
        counts = (places < plan.total).to(world.device, non_blocking=True)
        loss, right = _backward(learner, images, targets, counts, config, world, plan, step)
        watch.see(loss, len(images), step)
        sums += torch.stack([loss, right]).double()
        if plan.updates_after(step):
            _update(learner, config, epoch, step // plan.accumulation)
        if watch.looks_after(step):
            rate = learner.optimizer.param_groups[0]["lr"]
            log.status = f"loss {watch.mean:.4f}  lr {rate:.3g}"
    seconds = time.perf_counter() - start
    loss_sum, right_sum = summed(sums, world).tolist()
    return EpochResult(loss_sum / plan.total, 100 * right_sum / plan.total, plan.total / seconds)


def _backward(
    learner: Learner,
    images: Tensor,
    targets: Tensor,
    counts: Tensor,
    config: TrainConfig,
    world: World,
    plan: Plan,
    step: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of one step; returns the sums of the losses and of the right answers that count."""
    alone = not world.distributed or plan.updates_after(step)
    with nullcontext() if alone else learner.wrapped.no_sync():  # type: ignore[operator]
        # An attention reads its weights several times a step: each masked weight is made once.
        with autocast(world.device, config.amp), parametrize.cached():
            logits = learner.wrapped(images)
            losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=config.label_smoothing)
            total = (losses * counts).sum()
        # The processes' gradients are averaged, and each holds the sum over its own images.
        learner.scaler.scale(total * (world.size / plan.images_of_update(step))).backward()
    labels = targets.argmax(1) if targets.dim() == 2 else targets
    right = ((logits.argmax(1) == labels) & counts).sum()
    return total.detach(), right.to(total.dtype)


def _update(learner: Learner, config: TrainConfig, epoch: int, update: int) -> None:
    """Move the weights by the gradients gathered so far, and let the average follow."""
    if config.optimizer.clip_grad_norm is not None:
        learner.scaler.unscale_(learner.optimizer)
        nn.utils.clip_grad_norm_(learner.model.parameters(), config.optimizer.clip_grad_norm)
    learner.scaler.step(learner.optimizer)
    learner.scaler.update()
    learner.optimizer.zero_grad()
    if learner.ramp is not None:
        learner.ramp.step()
    if learner.average is not None and config.average is not None and update % config.average.steps == 0:
        update_average(learner.average, learner.model, warming_up=epoch < config.schedule.warmup_epochs)


class _Watch:
    """Looks at the losses every few steps, so that a GPU is not waited for at each, and stops at one not finite."""

    def __init__(self, epoch: int, steps: int, config: TrainConfig, world: World) -> None:
        self.epoch, self.steps, self.config, self.world = epoch, steps, config, world
        self.losses: list[Tensor] = []
        self.images = 0
        self.mean = 0.0  # This process's, an image, over the steps last looked at.

    def see(self, loss: Tensor, images: int, step: int) -> None:
        self.losses.append(loss)
        self.images += images
        if self.looks_after(step):
            self._look(step)

    def looks_after(self, step: int) -> bool:
        return (step + 1) % self.config.print_freq == 0 or step + 1 == self.steps

    def _look(self, step: int) -> None:
        recent = torch.stack(self.losses).tolist()
        self.mean = sum(recent) / self.images
        self.losses, self.images = [], 0
        first = step - len(recent) + 1
        bad = [first + place for place, loss in enumerate(recent) if not math.isfinite(loss)]
        place = smallest(bad[0] if bad else NEVER, self.world)
        if place < NEVER:
            kept = f"{self.config.output_dir}/ keeps the last good checkpoint; " if self.config.output_dir else ""
            raise TrainingError(
                f"the loss is not finite at step {place} of epoch {self.epoch} "
                f"(step {self.epoch * self.steps + place} of the run): {kept}lower --lr or set --clip-grad-norm"
            )
