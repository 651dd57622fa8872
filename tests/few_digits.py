"""A part of the digits, for runs that are soon done with."""

from __future__ import annotations

from dataclasses import replace

import pytest

from superblock.training import data
from superblock.training.small import SmallData, SmallImages, load_small


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """48 digits to train on, 20 to evaluate."""
    whole = load_small("digits", None)

    def load(name: str, path: str | None) -> SmallData:
        train = SmallImages(whole.train.images[:48], whole.train.labels[:48])
        return replace(whole, train=train, val=SmallImages(whole.val.images[:20], whole.val.labels[:20]))

    monkeypatch.setattr(data, "load_small", load)
