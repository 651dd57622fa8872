"""A whole evaluation: from a configuration to the accuracy of a model in one of its forms."""

from __future__ import annotations

import torch

from superblock.surgery import apply_supermask
from superblock.training.config import EvalConfig
from superblock.training.data import eval_loader
from superblock.training.distributed import World, joined
from superblock.training.evaluation import Metrics, evaluate
from superblock.training.log import Log
from superblock.training.setup import prepare, set_up_torch
from superblock.verification import cast
from superblock.weights import open_weights, take_form


def assess(config: EvalConfig, *, quiet: bool = False) -> Metrics:
    """Build, load, mask, fold and convert a model as ``config`` says, and measure it.

    Raises:
        SuperBlockError: whatever cannot be found, read, meant or matched.
    """
    set_up_torch(config)
    with joined(torch.device(config.device), config.world_size, config.dist_url) as world:
        return _assess(config, world, Log(quiet or not world.main, config.print_freq))


def _assess(config: EvalConfig, world: World, log: Log) -> Metrics:
    file = open_weights(config.weights_path) if config.weights_path is not None else None
    prepared = prepare(config, file, training=False)
    model = prepared.model
    if file is not None:
        for notice in file.load_into(model, config.supermask, ema=config.average).notices:
            log.line(notice)
    elif config.supermask.active:
        apply_supermask(model, config.supermask)
    report = take_form(model, config.sparsify_weights, config.bsr)
    if report is not None:
        for line in (*report.notes, report.totals()):
            log.line(line)
    dtype = getattr(torch, config.dtype)
    cast(model, dtype)
    model.to(world.device)
    loader = eval_loader(prepared.data, config.data, world)
    log.line(f"{prepared.name} on {config.data.dataset}")
    return evaluate(
        model,
        loader,
        world.device,
        classes=prepared.classes,
        label_smoothing=config.label_smoothing,
        amp=config.amp,
        dtype=dtype,
        log=log,
        name="EMA" if config.average else "",
    )
