"""Which image each process sees when."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import Sampler
from torch.utils.data.distributed import DistributedSampler

from superblock.training.config import DataConfig


class TrainSampler(Sampler[tuple[int, int]]):
    """Pairs ``(index, position)``: an image, and its place in the epoch's order over all processes.

    The position seeds the image's augmentation, so that it is the same at any number of processes and workers.
    Positions from ``total`` on fill up the last round of processes and must not count.
    """

    def __init__(self, size: int, config: DataConfig, seed: int, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        indices: Any = range(size)
        if config.ra_sampler:
            from timm.data.distributed_sampler import RepeatAugSampler

            self.inner: Any = RepeatAugSampler(
                indices, num_replicas=world_size, rank=rank, num_repeats=config.ra_reps, selected_round=0
            )
            self.total = len(self.inner) * world_size
        else:
            self.inner = DistributedSampler(indices, num_replicas=world_size, rank=rank, shuffle=True, seed=seed)
            self.total = size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for turn, index in enumerate(self.inner):
            yield index, turn * self.world_size + self.rank

    def __len__(self) -> int:
        return len(self.inner)

    def set_epoch(self, epoch: int) -> None:
        """Another order for every epoch."""
        self.inner.set_epoch(epoch)


class EvalSampler(Sampler[int]):
    """Every image exactly once over all processes, none added to even them out."""

    def __init__(self, size: int, rank: int, world_size: int) -> None:
        self.indices = range(rank, size, world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)
