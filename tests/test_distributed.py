"""Several processes, as torchrun starts them on a CPU: they train and count like one, fail together, and come back."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from images import write_fashion

from superblock.cli.main import run
from superblock.errors import BackendError, ConfigError, DataError
from superblock.files import read_checkpoint
from superblock.training.distributed import World, agreed_name, joined, on_main

ROOT = Path(__file__).parents[1]
TRAIN = shlex.split(
    "--model vit_fashion --dataset fashion-mnist --device cpu --threads 1 --epochs 2 --lr 0.05 --lr-step-size 1 "
    "--model-ema --model-ema-steps 1 --sparsity-linear 0.5 --sp-linear-tile-size 16 --keep-checkpoints 0 --workers 0"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """37 images: they divide by no number of processes."""
    return str(write_fashion(tmp_path_factory.mktemp("fashion"), train=37, val=13))


def torchrun(*arguments: object, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, f"--max-restarts={restarts}", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: pytest.TempPathFactory, data: str) -> Path:
    folder = tmp_path_factory.mktemp("two")
    arguments = [*TRAIN, "--data-path", data, "--batch-size", 6, "--output-dir", folder]
    done = torchrun(ROOT / "train.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Training time") == 1
    return folder


def test_two_workers_train_like_one_at_the_same_global_batch(two_workers: Path, tmp_path: Path, data: str) -> None:
    arguments = [*TRAIN, "--data-path", data, "--batch-size", "12", "--output-dir", str(tmp_path)]
    assert run("train", arguments) == 0
    two, one = (read_checkpoint(folder / "checkpoint.pth") for folder in (two_workers, tmp_path))
    for key in ("model", "model_ema"):
        for name, value in one[key].items():
            torch.testing.assert_close(two[key][name], value, atol=1e-5, rtol=0)
    for a, b in zip(two["metrics"], one["metrics"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["acc1"] == b["acc1"]
        assert a["val_loss"] == pytest.approx(b["val_loss"], abs=1e-5)


def test_a_killed_worker_comes_back_from_the_last_checkpoint(two_workers: Path, tmp_path: Path, data: str) -> None:
    arguments = [*TRAIN, "--data-path", data, "--batch-size", 6, "--output-dir", tmp_path, "--resume", "auto"]
    crashed = tmp_path / "crashed"
    done = torchrun(ROOT / "tests" / "crashing_train.py", crashed, *arguments, restarts=1)
    assert done.returncode == 0, done.stderr
    assert crashed.exists()
    assert "starting from the beginning" in done.stdout
    assert "checkpoint.pth with epoch 1" in done.stdout
    whole, resumed = (read_checkpoint(folder / "checkpoint.pth") for folder in (two_workers, tmp_path))
    assert all(torch.equal(whole["model"][name], value) for name, value in resumed["model"].items())


def test_two_workers_count_every_image_once() -> None:
    arguments = shlex.split("--model vit_digits --dataset digits --split all --device cpu --batch-size 128")
    done = torchrun(ROOT / "evaluate.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert "over 1797 images" in done.stdout
    assert re.search(r"^Test:  Acc@1 \d+\.\d{3} Acc@5 \d+\.\d{3}$", done.stdout, re.MULTILINE)


def test_an_error_of_the_first_worker_stops_all(tmp_path: Path, data: str) -> None:
    (tmp_path / "file").touch()
    done = torchrun(ROOT / "train.py", *TRAIN, "--data-path", data, "--output-dir", tmp_path / "file" / "out")
    assert done.returncode != 0
    assert "train: --output-dir" in done.stderr
    assert "Not a directory; training was not started" in done.stderr
    assert "CheckpointError" not in done.stderr


def test_several_processes_must_be_started_by_something(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"--world-size 4, .* use torchrun --nproc_per_node=4"):
        joined(torch.device("cpu"), world_size=4).__enter__()


def test_a_process_without_a_gpu_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "3")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(BackendError, match="process 3 of this machine has no GPU, there are 2: start fewer"):
        joined(torch.device("cuda")).__enter__()


def test_slurm_and_a_url_join_processes_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, object] = {}
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **rest: asked.update(rest))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    monkeypatch.setattr("superblock.training.distributed.agreed_name", lambda store, rank, size: "ours")
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_PROCID", "2")
    with joined(torch.device("cpu"), 4, f"file://{tmp_path}/meet") as world:
        assert (world.rank, world.size, world.main) == (2, 4, False)
    store = asked.pop("store")
    assert isinstance(store, torch.distributed.PrefixStore)
    store.set("key", "value")
    assert store.underlying_store.get("ours/key") == b"value"
    assert asked == {"rank": 2, "world_size": 4}


def test_processes_started_again_agree_on_a_new_name() -> None:
    store = torch.distributed.HashStore()
    for other in ("1", "2"):
        store.set(f"superblock/greeting/{other}", "of a process that is dead")
    names = set[str]()
    for _ in range(3):
        with ThreadPoolExecutor(3) as pool:
            agreed = [pool.submit(agreed_name, store, rank, 3) for rank in (0, 1, 2)]
        name, *others = (future.result(timeout=60) for future in agreed)
        assert others == [name, name]
        names.add(name)
    assert len(names) == 3


def test_what_the_main_process_finds_out_is_known_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise DataError("no data: get some")

    sent: list[object] = []
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda answer: sent.extend(answer))
    first = World(torch.device("cpu"), 0, 2)
    assert on_main(first, lambda: 7) == 7
    with pytest.raises(DataError, match="no data: get some"):
        on_main(first, fail)
    assert sent == [7, None, None, None, "DataError", "no data: get some"]

    def receive(answer: list[object]) -> None:
        answer[:] = [None, "DataError", "no data: get some"]

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", receive)
    never: Callable[[], None] = pytest.fail
    with pytest.raises(DataError, match="no data: get some"):
        on_main(World(torch.device("cpu"), 1, 2), never)
