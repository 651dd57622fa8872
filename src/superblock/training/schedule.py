"""Learning rates from epoch to epoch: torch's schedulers, with a warm-up before them."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    ExponentialLR,
    LinearLR,
    LRScheduler,
    SequentialLR,
    StepLR,
)

from superblock.training.config import ScheduleConfig


def make_schedule(optimizer: Optimizer, config: ScheduleConfig, epochs: int) -> LRScheduler:
    """The scheduler that ``config`` names, stepped once an epoch over ``epochs`` epochs, warm-up included."""
    main = _main(optimizer, config, epochs)
    if config.warmup_epochs == 0:
        return main
    warmup: LRScheduler
    if config.warmup_method == "linear":
        warmup = LinearLR(optimizer, start_factor=config.warmup_decay, total_iters=config.warmup_epochs)
    else:
        warmup = ConstantLR(optimizer, factor=config.warmup_decay, total_iters=config.warmup_epochs)
    return SequentialLR(optimizer, [warmup, main], milestones=[config.warmup_epochs])


def _main(optimizer: Optimizer, config: ScheduleConfig, epochs: int) -> LRScheduler:
    if config.name == "steplr":
        return StepLR(optimizer, step_size=config.step_size, gamma=config.gamma)
    if config.name == "exponentiallr":
        return ExponentialLR(optimizer, gamma=config.gamma)
    # A run that ends within its warm-up never gets here, but the scheduler wants a length.
    return CosineAnnealingLR(optimizer, T_max=max(1, epochs - config.warmup_epochs), eta_min=config.min_lr)
