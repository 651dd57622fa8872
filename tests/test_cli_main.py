"""The command line's frame: help, unknown commands, one-line errors."""

from __future__ import annotations

import subprocess
import sys

import pytest

from superblock.cli.main import COMMANDS, guarded, main
from superblock.errors import ConfigError


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in COMMANDS)


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"usage: superblock {command}" in capsys.readouterr().out


def test_an_unknown_command_names_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune"]) == 2
    assert capsys.readouterr().err.startswith("superblock: unknown command 'prune': expected one of benchmark, train")


def test_an_error_for_users_is_one_line_and_status_two(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise ConfigError("expected this, got that: do so")

    assert guarded("train", fail) == 2
    assert capsys.readouterr().err == "train: expected this, got that: do so\n"


def test_a_missing_optional_package_names_the_extra(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise ModuleNotFoundError("No module named 'torchvision'", name="torchvision")

    assert guarded("train", fail) == 2
    assert capsys.readouterr().err == "train: needs torchvision: pip install 'superblock[vision]'\n"


def test_a_mistake_of_our_own_is_not_hidden() -> None:
    def fail() -> None:
        raise ModuleNotFoundError("No module named 'superblock.nowhere'", name="superblock.nowhere")

    with pytest.raises(ModuleNotFoundError):
        guarded("train", fail)


@pytest.mark.parametrize(("arguments", "status"), [([], 0), (["--version"], 0), (["fly"], 2)])
def test_the_module_is_the_command(arguments: list[str], status: int, capfd: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "superblock", *arguments], check=False)
    by_module = capfd.readouterr()
    assert done.returncode == main(arguments) == status
    assert by_module == capfd.readouterr()


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = [sys.executable, "-c", "from superblock.cli.main import entry; entry()", "info"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.close()
        assert "BrokenPipeError" not in running.stderr.read()
    assert running.returncode == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_arguments_that_cannot_be_read_are_one_line(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--no-such-flag"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{command}: ")
    assert error.endswith(": see --help\n")
    assert error.count("\n") == 1
