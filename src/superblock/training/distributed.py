"""Processes that train one model: joining them, adding over them, failing together."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, distributed
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from superblock import errors
from superblock.errors import BackendError, ConfigError, SuperBlockError

PATIENCE = timedelta(minutes=30)  # torch's own, for processes of several machines.


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
    store, rank, size = next(rendezvous(dist_url, rank, size, timeout=PATIENCE))
    store.set_timeout(PATIENCE)
    store = PrefixStore(agreed_name(store, rank, size), store)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size)
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


def agreed_name(store: Store, rank: int, size: int) -> str:
    """A name that the processes started together agree on, new at every start.

    torchrun keeps one store over its restarts, and in it the addresses of processes that are dead by now; its count of
    restarts differs from machine to machine. So the first process makes up a name and tells it to every greeting,
    those of the dead included, until each of the living has repeated it.
    """
    if rank > 0:
        greeting = uuid4().hex
        store.set(f"superblock/greeting/{rank}", greeting)
        name = store.get(f"superblock/answer/{greeting}").decode()
        store.set(f"superblock/{name}/{rank}", "")
        return name
    name = uuid4().hex
    waiting = set(range(1, size))
    while waiting:
        for other in waiting:
            greeting = store.get(f"superblock/greeting/{other}").decode()
            store.set(f"superblock/answer/{greeting}", name)
        time.sleep(0.01)
        waiting = {other for other in waiting if not store.check([f"superblock/{name}/{other}"])}
    return name


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
