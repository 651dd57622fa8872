"""Processes that train one model: joining them, adding over them, failing together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from superblock import errors
from superblock.errors import BackendError, ConfigError, SuperBlockError


@dataclass(frozen=True)
class World:
    """This process among all of them."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    @property
    def distributed(self) -> bool:
        """Whether there are others."""
        return self.size > 1


@contextmanager
def joined(device: torch.device, world_size: int = 1, dist_url: str = "env://") -> Iterator[World]:
    """Join the processes that ``torchrun`` (or Slurm, with ``--world-size`` and ``--dist-url``) started.

    gloo connects processes on the CPU, nccl those on GPUs, one GPU a process.

    Raises:
        ConfigError: several processes are asked for and nothing started them.
        BackendError: fewer GPUs than processes on this machine.
    """
    rank, size, local = _place(world_size)
    if size == 1:
        yield World(device)
        return
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise BackendError(
                f"process {local} of this machine has no GPU, there are {torch.cuda.device_count()}: start fewer"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, init_method=dist_url, rank=rank, world_size=size)
    try:
        yield World(device, rank, size)
    finally:
        distributed.destroy_process_group()


def _place(world_size: int) -> tuple[int, int, int]:
    """Rank, number of processes, and rank on this machine."""
    environment = os.environ
    if "RANK" in environment and "WORLD_SIZE" in environment:
        rank = int(environment["RANK"])
        return rank, int(environment["WORLD_SIZE"]), int(environment.get("LOCAL_RANK", rank))
    if world_size > 1 and "SLURM_PROCID" in environment:
        rank = int(environment["SLURM_PROCID"])
        return rank, world_size, int(environment.get("SLURM_LOCALID", rank))
    if world_size > 1:
        raise ConfigError(
            f"--world-size {world_size}, but this process was started alone: "
            f"use torchrun --nproc_per_node={world_size} train.py …"
        )
    return 0, 1, 0


def summed(values: Tensor, world: World) -> Tensor:
    """``values`` added over all processes."""
    if world.distributed:
        distributed.all_reduce(values)
    return values


def smallest(value: int, world: World) -> int:
    """The smallest ``value`` of all processes."""
    if not world.distributed:
        return value
    held = torch.tensor(value, device=world.device)
    distributed.all_reduce(held, distributed.ReduceOp.MIN)
    return int(held)


def on_main(world: World, action: Callable[[], Any]) -> Any:
    """What ``action`` returns in the main process, in all of them; its error is raised in all of them too."""
    answer: list[Any] = [None, None, None]
    if world.main:
        try:
            answer[0] = action()
        except SuperBlockError as error:
            if not world.distributed:
                raise
            answer[1:] = type(error).__name__, str(error)
    if world.distributed:
        distributed.broadcast_object_list(answer)
    result, kind, message = answer
    if kind is not None:
        raise getattr(errors, kind)(message)
    return result
