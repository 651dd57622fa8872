"""The exponential moving average of a model's weights, buffers and scores."""

from __future__ import annotations

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from superblock.training.config import TrainConfig


def make_average(model: nn.Module, config: TrainConfig, world_size: int) -> AveragedModel | None:
    """A copy of ``model`` that follows it, or ``None`` where none was asked for.

    The decay is adjusted so that it means the same at any batch size and number of epochs (as pycls and torchvision
    do): ``1 - min(1, (1 - decay) · images between two updates / epochs)``.
    """
    if config.average is None:
        return None
    images = world_size * config.data.batch_size * config.accumulation_steps * config.average.steps
    decay = 1.0 - min(1.0, (1.0 - config.average.decay) * images / config.epochs)
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def update_average(average: AveragedModel, model: nn.Module, warming_up: bool) -> None:
    """Take the model in; while the learning rate warms up the average stays a plain copy."""
    average.update_parameters(model)
    if warming_up:
        average.n_averaged.fill_(0)
