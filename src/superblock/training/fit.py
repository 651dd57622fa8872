"""A whole run of training: from a configuration to a trained model, its figures and its checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from superblock.config import SupermaskConfig
from superblock.errors import CheckpointError, ConfigError
from superblock.report import Report
from superblock.surgery import apply_supermask, supermask_report
from superblock.training.average import make_average
from superblock.training.config import TrainConfig
from superblock.training.data import begin_epoch, eval_loader, train_loader
from superblock.training.distributed import World, joined, on_main
from superblock.training.evaluation import evaluate
from superblock.training.log import Log, duration
from superblock.training.loop import Learner, train_epoch
from superblock.training.masking import MaskWatch
from superblock.training.metrics import MetricsFile, Record
from superblock.training.optim import make_optimizer
from superblock.training.ramp import Ramp
from superblock.training.randomness import seed_all
from superblock.training.resume import advance, snapshot, take_up
from superblock.training.schedule import make_schedule
from superblock.training.setup import prepare, set_up_torch
from superblock.training.state import find_checkpoint, prepare_folder, save_checkpoint
from superblock.weights import open_weights


@dataclass(frozen=True)
class TrainResult:
    """A trained model (on the run's device), its average, its masks' report, and the figures of every epoch."""

    model: nn.Module
    average: nn.Module | None
    report: Report
    history: list[Record]


def fit(config: TrainConfig, *, quiet: bool = False, on_epoch: Callable[[Record], object] | None = None) -> TrainResult:
    """Train as ``config`` says; under ``torchrun``, as one of its processes.

    Args:
        config: the whole run.
        quiet: print nothing.
        on_epoch: called with an epoch's figures after its checkpoint is written.

    Raises:
        SuperBlockError: whatever cannot be found, read, meant, matched or written, in every process; nothing is
            trained then.
        TrainingError: the loss is no longer finite; the checkpoints of earlier epochs are kept.
    """
    set_up_torch(config)
    with joined(torch.device(config.device), config.world_size, config.dist_url) as world:
        return _Run(config, world, Log(quiet or not world.main, config.print_freq)).train(on_epoch)


class _Run:
    """What :func:`fit` sets up, and its loop over epochs."""

    def __init__(self, config: TrainConfig, world: World, log: Log) -> None:
        if config.sync_bn and world.distributed and world.device.type != "cuda":
            raise ConfigError(f"--sync-bn needs GPUs, the device is {world.device.type}: leave it out")
        self.config, self.world, self.log = config, world, log
        self.folder = Path(config.output_dir) if config.output_dir else None
        self.metrics: MetricsFile | None = None
        found = on_main(world, lambda: find_checkpoint(config.resume, config.output_dir))
        source = found.path or config.weights_path
        file = open_weights(source) if source is not None else None
        self.prepared = prepare(config, file, training=True)
        model, content, notices = self.prepared.model, None, found.notices
        self.supermask, ramp = config.supermask, config.sparsity_ramp * config.epochs
        if file is not None:
            loaded = file.load_into(model, config.supermask)
            if loaded.form not in ("dense", "masked"):
                raise CheckpointError(f"{source} is folded already and cannot be trained: take the .pth it came from")
            self.supermask = loaded.supermask or SupermaskConfig()
            content, notices = loaded.content if found.path else None, (*notices, *loaded.notices)
            if loaded.form == "masked" and not found.path:
                ramp = 0.0  # The masks that a file brings are kept.
        elif config.supermask.active:
            apply_supermask(model, config.supermask)
        trained = config.optimizer.score_lr is not None or self.supermask.rule == "original"
        self.learner = _learner(model, config, world, None if trained else ramp)
        self.schedule = make_schedule(self.learner.optimizer, config.schedule, config.epochs)
        self.first, self.history = config.start_epoch, list[Record]()
        if content is not None:
            self.first, self.history, more = take_up(content, self.learner, self.schedule, str(source))
            notices = (*notices, *more, f"going on from {source} with epoch {self.first}")
        else:
            advance(self.schedule, self.first)
        if self.learner.ramp is not None:
            self.learner.ramp.begin_epoch(self.first)
        for notice in notices:
            log.line(notice)
        on_main(world, self._open_folder)

    def train(self, on_epoch: Callable[[Record], object] | None) -> TrainResult:
        config, world, model = self.config, self.world, self.learner.model
        data = self.prepared.data
        report = supermask_report(model)
        for line in (*report.notes, report.totals()) if report.layers else ():
            self.log.line(line)
        loader, val_loader = train_loader(data, config.data, world, config.seed), eval_loader(data, config.data, world)
        watch = MaskWatch(model)
        start = time.perf_counter()
        for epoch in range(self.first, config.epochs):
            seed_all(config.seed, epoch, world.rank)
            begin_epoch(loader, epoch, config.seed, world)
            lr = self.learner.optimizer.param_groups[0]["lr"]
            result = train_epoch(self.learner, loader, config, world, epoch, self.log)
            self.schedule.step()
            record: Record = {"epoch": epoch, **asdict(result), "lr": lr, **watch.figures()}
            self.log.line(_summary(record))
            record |= self._measured(val_loader)
            self.history.append(record)
            on_main(world, partial(self._write, record))
            if on_epoch is not None:
                on_epoch(record)
        self.log.line(f"Training time {duration(time.perf_counter() - start)}")
        average = None if self.learner.average is None else self.learner.average.module
        return TrainResult(model, average, supermask_report(model), self.history)

    def _measured(self, loader: DataLoader[Any]) -> Record:
        """The accuracy of the model, and of its average where there is one."""
        record: Record = {}
        for prefix, model, name in (("val", self.learner.model, ""), ("ema", self.learner.average, "EMA")):
            if model is not None:
                found = evaluate(
                    model,
                    loader,
                    self.world.device,
                    classes=self.prepared.classes,
                    label_smoothing=self.config.label_smoothing,
                    amp=self.config.amp,
                    log=self.log,
                    name=name,
                )
                record |= {f"{prefix}_{key}": getattr(found, key) for key in ("loss", "acc1", "acc5")}
        return record

    def _open_folder(self) -> None:
        if self.folder is not None:
            copies = {"sgd": 1, "rmsprop": 2, "adamw": 2}[self.config.optimizer.name] + 1
            copies += self.learner.average is not None
            files = 1 if self.config.keep_checkpoints == 0 else 2
            tensors = self.learner.model.state_dict().values()
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            prepare_folder(self.folder, size * copies * files)
            self.metrics = MetricsFile(self.folder, self.history, self.config.tensorboard)

    def _write(self, record: Record) -> None:
        if self.folder is not None and self.metrics is not None:
            self.metrics.write(record)
            content = snapshot(
                self.learner, self.schedule, self.prepared, self.supermask, self.config, self.history, record["epoch"]
            )
            save_checkpoint(self.folder, content, self.config.keep_checkpoints)


def _learner(model: nn.Module, config: TrainConfig, world: World, ramp_epochs: float | None) -> Learner:
    """All that trains; ``ramp_epochs`` is how long sparsity grows, ``None`` where scores are trained instead."""
    model.to(world.device)
    if config.sync_bn and world.distributed:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    average = make_average(model, config, world.size)
    ramp = None if ramp_epochs is None else Ramp(model, ramp_epochs, average)
    optimizer = make_optimizer(model, config.optimizer)
    scaler = torch.amp.GradScaler(world.device.type, enabled=config.amp and world.device.type == "cuda")
    wrapped: nn.Module = model
    if world.distributed:
        wrapped = DistributedDataParallel(model, device_ids=[world.device] if world.device.type == "cuda" else None)
    return Learner(model, wrapped, optimizer, scaler, average, ramp)


def _summary(record: Record) -> str:
    sparsity = (
        f"  sparsity {record['masked_sparsity']:.2%} of masked layers, {record['model_sparsity']:.2%} of the model"
        f"  tiles changed {record['tiles_changed']:.2%}"
        if record["masked_sparsity"]
        else ""
    )
    return (
        f"Epoch: [{record['epoch']}]  loss {record['loss']:.4f}  Acc@1 {record['acc1']:.3f}  lr {record['lr']:.3g}"
        f"{sparsity}  {record['images_per_second']:.0f} images/s"
    )
