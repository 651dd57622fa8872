"""``superblock download`` lists what is published and puts it where the commands look for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import refused, run
from hub_server import Hub, serve

from superblock import hub

pytest.importorskip("huggingface_hub")

CONTENT = b"weights" * 1000


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    file = {"checkpoints/sp0.80-ts32.pth": CONTENT}
    with serve(Hub({hub.REPOSITORY: file, "someone/vit": file})) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
        yield running


def test_without_a_name_what_is_published_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "download")
    assert status == 0
    assert {"baseline", "sp0.70-ts16", "sp0.86-ts64", "sp0.90-ts32"} <= set(out.split())
    assert set(hub.PUBLISHED) <= set(out.split())


def test_weights_are_put_where_the_commands_look(capsys: pytest.CaptureFixture[str], server: Hub) -> None:
    status, out, _ = run(capsys, "download", "sp0.80-ts32")
    assert status == 0
    assert Path("checkpoints/superblock-vit-b-16-sp0.80-ts32.pth").read_bytes() == CONTENT
    assert "checkpoints/superblock-vit-b-16-sp0.80-ts32.pth: 0.0 MB" in out
    status, out, _ = run(capsys, "download", "sp0.80-ts32")
    assert status == 0
    assert "was there already" in out
    assert server.gets() == [None]


def test_folder_and_repository_can_be_chosen(capsys: pytest.CaptureFixture[str], server: Hub) -> None:
    arguments = ("download", "sp0.80-ts32.pth", "--output-dir", "elsewhere", "--repo", "someone/vit")
    assert run(capsys, *arguments)[0] == 0
    assert Path("elsewhere/vit-sp0.80-ts32.pth").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sp0.81-ts32",), "no published weights 'sp0.81-ts32': expected one of baseline, sp0.70-ts16"),
        (("sp0.70-ts32",), "has no file checkpoints/sp0.70-ts32.pth"),
        (("other", "--repo", "someone/vit"), "has no file checkpoints/other.pth: check the name"),
        (("other", "--repo", "nobody/vit"), "has no public repository nobody/vit"),
        (("sp0.80-ts32", "--output-dir", "file/inside"), "cannot fetch"),
    ],
)
def test_what_cannot_be_fetched_is_one_line_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], server: Hub, arguments: tuple[str, ...], message: str
) -> None:
    Path("file").touch()
    assert message in refused(capsys, "download", *arguments)
    assert [path.name for path in Path().iterdir()] == ["file"]


def test_an_unreachable_server_is_one_line(
    capsys: pytest.CaptureFixture[str], server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "cannot reach http://127.0.0.1:9" in refused(capsys, "download", "sp0.80-ts32")
    assert not Path("checkpoints").exists()
