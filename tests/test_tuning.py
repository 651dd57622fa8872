"""The choice of a configuration: measured once, kept in a file, guessed where neither is possible."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_bsr import blocky

from superblock import BSRMatrix
from superblock.errors import ConfigError
from superblock.ops import tuning
from superblock.ops.triton.configs import DENSE, Case, Config, product_configs, sampled_configs
from superblock.ops.triton.launch import H100, splits_for
from superblock.ops.triton.plans import plan_of


def case(tokens: int = 4096, block: tuple[int, int] = (64, 64), dtype: torch.dtype = torch.bfloat16) -> Case:
    matrix = BSRMatrix.from_dense(blocky((512, 512), block, 0.2), block)
    plan = plan_of(matrix.crow_indices, matrix.col_indices, matrix.nnz, *matrix.grid)
    return Case("linear", torch.empty(tokens, 512, dtype=dtype, device="meta"), plan, (512, 512), block)


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuning.Results:
    found = tuning.Results(tmp_path / "tuned.json", 10.0)
    monkeypatch.setattr(tuning, "results", lambda: found)
    return found


def refuse(*_: object) -> Any:
    raise AssertionError("nothing should run")


def test_without_a_gpu_the_guess_is_used_and_remembered(results: tuning.Results) -> None:
    one = case()
    assert tuning.choose(one, product_configs, refuse, refuse) == product_configs(one)[0]
    assert tuning.choose(one, refuse, refuse, refuse) == product_configs(one)[0]


def test_a_kept_result_wins_and_the_dense_product_too(results: tuning.Results) -> None:
    one = case()
    slower = product_configs(one)[-1]
    results.add(one.name, slower, 1.0, 2.0)
    assert tuning.choose(one, product_configs, refuse, refuse) == slower
    other = case(64)
    results.add(other.name, DENSE, 2.0, 2.0)
    assert tuning.choose(other, product_configs, refuse, refuse) == DENSE
    assert results.describe() == f"2 tuned cases in {results.path}, of which 1 run dense because that is faster"


def test_a_result_that_no_longer_fits_is_passed_over(results: tuning.Results) -> None:
    one = case()
    results.add(one.name, Config("product", 8, 8, 8), 1.0, 2.0)
    assert tuning.choose(one, product_configs, refuse, refuse) == product_configs(one)[0]


def test_the_fastest_is_measured_within_the_seconds(results: tuning.Results, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    one = case()
    options = product_configs(one)
    times = iter([5.0, 3.0, 2.0, 4.0])
    clock = iter([0.0, 1.0, 2.0, 11.0, 12.0])
    monkeypatch.setattr("triton.testing.do_bench", lambda *_, **__: next(times))
    monkeypatch.setattr(tuning.time, "monotonic", lambda: next(clock))
    assert tuning._measure(one, options, refuse, refuse) == options[1]
    assert results.seconds == -2.0
    kept = json.loads(results.path.read_text())["cases"][one.name]
    assert (kept["milliseconds"], kept["dense_milliseconds"]) == (2.0, 5.0)


def test_what_does_not_fit_the_memory_is_no_candidate(results: tuning.Results, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")

    def full(*_: object, **__: object) -> float:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("triton.testing.do_bench", full)
    one = case()
    assert tuning._measure(one, product_configs(one), refuse, refuse) == product_configs(one)[0]
    assert not results.cases


def test_the_file_is_shared(results: tuning.Results) -> None:
    results.add("one", DENSE, 1.0, 1.0)
    other = tuning.Results(results.path, 0.0)
    other.add("two", Config("product", 64, 64, 64, 4, 3), 1.0, 2.0)
    results.add("three", DENSE, 1.0, 1.0)
    assert sorted(json.loads(results.path.read_text())["cases"]) == ["one", "three", "two"]
    assert results.get("two") == Config("product", 64, 64, 64, 4, 3)
    assert results.get("four") is None


@pytest.mark.parametrize("text", ["{", "[]", '{"cases": {"a": {}}}', '{"cases": {"a": {"config": {"x": 1}}}}'])
def test_a_broken_file_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"tuned\.json is no file of tuning results .*delete it, or name another"):
        tuning.Results(path, 1.0)


def test_the_seconds_must_be_a_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SUPERBLOCK_TUNE_SECONDS", "many")
    monkeypatch.setenv("SUPERBLOCK_TUNE_FILE", str(tmp_path / "tuned.json"))
    tuning.results.cache_clear()
    with pytest.raises(ConfigError, match="SUPERBLOCK_TUNE_SECONDS must be a number of seconds, got 'many'"):
        tuning.results()
    tuning.results.cache_clear()


def test_a_case_is_named_by_all_that_decides() -> None:
    assert case().name.startswith("NVIDIA H100|linear|bfloat16|512x512|64x64|0.")
    assert case(5000).name.endswith("|8192")
    assert case(1, dtype=torch.float32).name.split("|")[2] == "float32/tf32x3"


@pytest.mark.parametrize("tokens", [1, 3, 5, 64, 100000])
@pytest.mark.parametrize("side", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_every_case_has_a_configuration_that_fits(tokens: int, side: int, dtype: torch.dtype) -> None:
    one = case(tokens, (side, 144 - side if side in (16, 128) else side), dtype)
    for config in (*product_configs(one), *sampled_configs(one)):
        assert min(config.m, config.n, config.k) > 0
        if config.engine != "decode":
            assert (config.m + config.n) * config.k * dtype.itemsize * config.stages <= H100.shared_memory
    assert product_configs(one)
    assert sampled_configs(one)


def test_merged_rows_are_preferred_where_blocks_are_dense() -> None:
    def merged(density: float) -> int:
        matrix = BSRMatrix.from_dense(blocky((4096, 4096), 32, density), 32)
        plan = plan_of(matrix.crow_indices, matrix.col_indices, matrix.nnz, *matrix.grid)
        one = Case("linear", torch.empty(8192, 4096, dtype=torch.bfloat16, device="meta"), plan, (4096, 4096), (32, 32))
        return product_configs(one)[0].n // 32

    assert merged(0.02) < merged(0.6)


def test_sums_are_cut_only_where_programs_are_few() -> None:
    assert splits_for(1000, 64, H100) == 1
    assert splits_for(33, 64, H100) == 8
    assert splits_for(33, 7, H100) == 1
    assert splits_for(0, 64, H100) == 1
