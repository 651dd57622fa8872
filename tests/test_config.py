"""Configurations are validated on construction and survive a checkpoint."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from superblock import SupermaskConfig, TileSparsity
from superblock.errors import ConfigError


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan"), "0.5", None, True])
def test_sparsity_outside_the_half_open_interval_is_refused(sparsity: Any) -> None:
    with pytest.raises(ConfigError, match=r"sparsity must be in \[0, 1\), got"):
        TileSparsity(sparsity)


@pytest.mark.parametrize("tile", [0, -4, 2.5, 16.0, True, None, float("nan"), float("inf"), (16, 16), "16"])
def test_a_tile_is_a_whole_number_of_at_least_one(tile: Any) -> None:
    with pytest.raises(ConfigError, match="tile size must be a whole number of at least 1, got"):
        TileSparsity(0.5, tile)


def test_an_unknown_scope_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="scope must be one of all, mlp, got 'attention'"):
        SupermaskConfig(linear=TileSparsity(0.5), scope="attention")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["linear", "conv1x1", "conv"])
@pytest.mark.parametrize("target", [0.9, (0.9, 16), {"sparsity": 0.9}])
def test_a_target_is_a_tile_sparsity(kind: str, target: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{kind} must be a TileSparsity\(sparsity, tile_size\) or None, got"):
        SupermaskConfig(**{kind: target})


@pytest.mark.parametrize("name", ["include", "exclude"])
@pytest.mark.parametrize("patterns", ["0.*", None, 3, (1, 2)])
def test_patterns_are_a_tuple(name: str, patterns: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{name} must be a tuple of patterns, as \('encoder\.\*',\), got"):
        SupermaskConfig(**{name: patterns})


def test_numbers_of_numpy_survive_as_plain_ones() -> None:
    target = TileSparsity(np.float32(0.5), np.int64(16))  # type: ignore[arg-type]
    assert json.dumps(SupermaskConfig(linear=target).to_dict()) == json.dumps(
        SupermaskConfig(linear=TileSparsity(0.5, 16)).to_dict()
    )


def test_plain_containers_round_trip() -> None:
    config = SupermaskConfig(
        linear=TileSparsity(0.9, 16), conv=TileSparsity(0.5, 8), skip_last_layer=True, exclude=("head*",)
    )
    assert SupermaskConfig.from_dict(config.to_dict()) == config
    assert config.active
    assert not SupermaskConfig().active
