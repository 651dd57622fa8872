"""Random numbers that follow from seeds alone, so that a resumed run draws what an uninterrupted one would have."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive(*parts: int) -> int:
    """A seed of 64 bits from several numbers (``seed``, ``epoch``, ``rank``, …), far from that of their neighbours."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])


def seed_all(*parts: int) -> None:
    """Seed Python's, NumPy's and torch's generators, every device's included."""
    seed = derive(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def seeded(*parts: int) -> Iterator[None]:
    """Inside, torch's CPU generator starts from a seed of ``parts``; afterwards it is as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive(*parts))
        yield
