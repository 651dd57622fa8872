"""Configurations are validated on construction and survive a checkpoint."""

from __future__ import annotations

import pytest

from superblock import SupermaskConfig, TileSparsity
from superblock.errors import ConfigError


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_sparsity_outside_the_half_open_interval_is_refused(sparsity: float) -> None:
    with pytest.raises(ConfigError, match=r"sparsity must be in \[0, 1\), got"):
        TileSparsity(sparsity)


@pytest.mark.parametrize("tile", [0, -4, 2.5, True])
def test_a_tile_is_a_whole_number_of_at_least_one(tile: int) -> None:
    with pytest.raises(ConfigError, match="tile size must be a whole number of at least 1, got"):
        TileSparsity(0.5, tile)


def test_an_unknown_scope_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="scope must be one of all, mlp, got 'attention'"):
        SupermaskConfig(linear=TileSparsity(0.5), scope="attention")  # type: ignore[arg-type]


def test_plain_containers_round_trip() -> None:
    config = SupermaskConfig(
        linear=TileSparsity(0.9, 16), conv=TileSparsity(0.5, 8), skip_last_layer=True, exclude=("head*",)
    )
    assert SupermaskConfig.from_dict(config.to_dict()) == config
    assert config.active
    assert not SupermaskConfig().active
