"""What a run of training leaves in a checkpoint, and takes up from one."""

from __future__ import annotations

import warnings
from typing import Any

from torch.optim.lr_scheduler import LRScheduler

from superblock.checkpoint import FORMAT, VERSION
from superblock.config import SupermaskConfig
from superblock.errors import CheckpointError
from superblock.original_optimizer import restore as restore_by_name
from superblock.training.config import TrainConfig
from superblock.training.loop import Learner
from superblock.training.metrics import Record
from superblock.training.setup import Prepared


def snapshot(
    learner: Learner,
    schedule: LRScheduler,
    prepared: Prepared,
    supermask: SupermaskConfig,
    config: TrainConfig,
    history: list[Record],
    epoch: int,
) -> dict[str, Any]:
    """A checkpoint after ``epoch``: only tensors, numbers, strings and containers.

    Random numbers follow from the seed, the epoch and the process alone, so that the seed is all to keep of them.
    """
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": learner.model.state_dict(),
        "model_ema": learner.average.state_dict() if learner.average is not None else None,
        "optimizer": learner.optimizer.state_dict(),
        "lr_scheduler": schedule.state_dict(),
        "scaler": learner.scaler.state_dict() if learner.scaler.is_enabled() else None,
        "epoch": epoch,
        "config": {
            "architecture": prepared.name,
            "num_classes": prepared.classes,
            "image_size": prepared.data.image_size,
            "supermask": supermask.to_dict(),
            "train": config.to_dict(),
            "data": config.to_dict()["data"],
        },
        "rng": {"seed": config.seed},
        "metrics": history,
    }


def take_up(
    content: dict[str, Any], learner: Learner, schedule: LRScheduler, source: str
) -> tuple[int, list[Record], list[str]]:
    """Restore all but the model's weights from a checkpoint.

    Args:
        content: as :func:`snapshot` made it, or as :mod:`superblock.weights` translated an original one.
        learner: whose model has its weights already.
        schedule: over the learner's optimizer.
        source: the checkpoint's name.

    Returns:
        The epoch to go on with, the figures of those before, and what the user should know.

    Raises:
        CheckpointError: the checkpoint's optimizer is over other parameters.
    """
    notices = []
    epoch = int(content.get("epoch", -1)) + 1
    if content.get("optimizer") is not None:
        try:
            learner.optimizer.load_state_dict(content["optimizer"])
        except ValueError as error:
            raise CheckpointError(
                f"the optimizer in {source} does not fit this run ({error}): repeat the flags of that run, "
                "or take only its weights with --weights-path"
            ) from error
    elif content.get("optimizer_by_name"):
        count = restore_by_name(learner.optimizer, learner.model, content["optimizer_by_name"])
        notices.append(f"the optimizer's state of {count} parameters was taken over from {source}")
    else:
        notices.append(f"{source} holds no optimizer state that fits: the optimizer starts anew")
    if content.get("lr_scheduler") is not None:
        schedule.load_state_dict(content["lr_scheduler"])
    else:
        advance(schedule, epoch)
    if content.get("scaler") and learner.scaler.is_enabled():
        learner.scaler.load_state_dict(content["scaler"])
    if learner.average is not None:
        if content.get("model_ema"):
            learner.average.load_state_dict(content["model_ema"])
        else:
            notices.append(f"{source} holds no average (model_ema): it starts from the model")
    return epoch, list(content.get("metrics") or []), notices


def advance(schedule: LRScheduler, epochs: int) -> None:
    """Bring a new schedule to where it is after some epochs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # That the optimizer has not stepped yet.
        for _ in range(epochs):
            schedule.step()
