"""Fetching from the hub: cached, resumed, verified, and every failure in one line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import Hub, serve

from superblock import hub
from superblock.errors import CheckpointError

pytest.importorskip("huggingface_hub")

FILE = "checkpoints/sp0.80-ts32.pth"
URI = f"hf://{hub.REPOSITORY}/{FILE}"
CONTENT = bytes(range(256)) * 4096


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one file, which ``HF_ENDPOINT`` names only after huggingface_hub was imported."""
    with serve(Hub({hub.REPOSITORY: {FILE: CONTENT}})) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
        yield running


def test_what_is_published_is_known_without_a_connection() -> None:
    assert len(hub.PUBLISHED) == 1 + 7 * 3
    assert {"baseline", "sp0.70-ts16", "sp0.80-ts32", "sp0.90-ts64"} <= set(hub.PUBLISHED)
    assert hub.local_name("sp0.80-ts32") == "superblock-vit-b-16-sp0.80-ts32.pth"
    assert hub.published_name(Path("checkpoints/superblock-vit-b-16-sp0.80-ts32.pth")) == "sp0.80-ts32"
    assert hub.published_name(Path("checkpoints/model_3.pth")) is None


def test_a_file_is_fetched_once_and_then_taken_from_the_cache(server: Hub, tmp_path: Path) -> None:
    path = hub.fetch(URI)
    assert path.read_bytes() == CONTENT
    assert path.is_relative_to(tmp_path / "cache")
    assert hub.fetch(URI) == path
    assert server.gets() == [None]


def test_large_files_come_from_the_storage_that_the_hub_redirects_to(server: Hub, tmp_path: Path) -> None:
    server.storage = True
    server.piece = 600_000
    assert hub.fetch(URI).read_bytes() == CONTENT
    assert server.gets() == [None, "bytes=600000-"]
    assert all("/stored/" in path for method, path, _ in server.requests if method == "GET" and "agent" not in path)


def test_the_cache_serves_without_a_connection(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    path = hub.fetch(URI)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert hub.fetch(URI) == path


@pytest.mark.parametrize("to_cache", [True, False])
def test_an_interrupted_download_goes_on_where_it_stopped(server: Hub, tmp_path: Path, to_cache: bool) -> None:
    target = tmp_path / "checkpoints" / "model.pth"
    server.budget = 100_000
    with pytest.raises(CheckpointError, match=r"cannot (reach|fetch)"):
        hub.fetch(URI) if to_cache else hub.download(hub.REPOSITORY, FILE, target)
    assert not target.exists()
    server.budget = None
    before = len(server.gets())
    if to_cache:
        target = hub.fetch(URI)
    else:
        assert hub.download(hub.REPOSITORY, FILE, target)
        assert [path.name for path in target.parent.iterdir()] == ["model.pth"]
    assert server.gets()[before:] == ["bytes=100000-"]
    assert target.read_bytes() == CONTENT


def test_a_connection_that_breaks_now_and_then_is_taken_up_again(server: Hub, tmp_path: Path) -> None:
    server.piece = 300_000
    assert hub.download(hub.REPOSITORY, FILE, tmp_path / "model.pth")
    assert (tmp_path / "model.pth").read_bytes() == CONTENT
    assert server.gets() == [None, "bytes=300000-", "bytes=600000-", "bytes=900000-"]


def test_a_server_without_ranges_begins_again(server: Hub, tmp_path: Path) -> None:
    server.budget = 100_000
    with pytest.raises(CheckpointError):
        hub.download(hub.REPOSITORY, FILE, tmp_path / "model.pth")
    server.budget, server.ranges = None, False
    assert hub.download(hub.REPOSITORY, FILE, tmp_path / "model.pth")
    assert (tmp_path / "model.pth").read_bytes() == CONTENT


def test_a_part_that_is_not_the_files_is_noticed(server: Hub, tmp_path: Path) -> None:
    target = tmp_path / "model.pth"
    server.budget = 100_000
    with pytest.raises(CheckpointError):
        hub.download(hub.REPOSITORY, FILE, target)
    (part,) = tmp_path.glob(".model.pth.*.incomplete")
    part.write_bytes(b"x" * 100)
    server.budget = None
    with pytest.raises(CheckpointError, match=r"came damaged .* download it again"):
        hub.download(hub.REPOSITORY, FILE, target)
    assert hub.download(hub.REPOSITORY, FILE, target)
    assert target.read_bytes() == CONTENT


def test_a_file_that_is_there_already_is_left_alone(server: Hub, tmp_path: Path) -> None:
    target = tmp_path / "model.pth"
    assert hub.download(hub.REPOSITORY, FILE, target)
    assert not hub.download(hub.REPOSITORY, FILE, target)
    assert server.gets() == [None]
    target.write_bytes(CONTENT[:-1] + b"x")
    assert hub.download(hub.REPOSITORY, FILE, target)
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        (f"hf://{hub.REPOSITORY}/checkpoints/sp0.81-ts32.pth", r"has no file .* expected .*sp0\.80-ts16"),
        ("hf://nobody/nothing/model.pth", "has no public repository nobody/nothing: check the name"),
        ("hf://nobody", "is no address on the hub: expected hf://owner/name/file"),
        ("hf://no body/nothing/model.pth", "cannot fetch no body/nothing/model.pth"),
    ],
)
def test_a_wrong_address_is_one_clear_line(server: Hub, uri: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        hub.fetch(uri)
    assert "\n" not in str(caught.value)


def test_an_unreachable_endpoint_is_one_clear_line(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match=r"cannot reach http://127\.0\.0\.1:9 .* set HF_ENDPOINT") as caught:
        hub.fetch(URI)
    assert "\n" not in str(caught.value)
