"""``superblock <command>``: finds the command, runs it, turns its errors into one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from superblock.errors import SuperBlockError

COMMANDS = {
    "benchmark": "time a model, dense and block-sparse",
    "train": "train a model with block masks",
    "evaluate": "measure a model's accuracy",
    "demo": "the whole path on handwritten digits, in minutes",
    "convert": "write a checkpoint as a deployable model",
    "inspect": "draw the masks of a checkpoint and report its sparsity",
    "info": "say which backends are active here, and why others are not",
    "download": "list or fetch the published weights",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``superblock`` with ``argv``; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        from superblock.version import version

        print(version())
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"superblock: unknown command {name!r}: expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return run(name, rest)


def entry() -> None:
    """The console script."""
    raise SystemExit(main())


def run(name: str, argv: Sequence[str] | None = None) -> int:
    """Run one command; an error made for users becomes one line on stderr and exit status 2."""
    return guarded(name, lambda: import_module(f"superblock.cli.{name}").main(argv))


def guarded(name: str, command: Callable[[], int | None]) -> int:
    """``command()``, with a :class:`SuperBlockError` or a missing optional package told in one line."""
    try:
        status = command() or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # Whoever reads what is printed has seen enough, as `| head` has.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SuperBlockError as error:
        print(f"{name}: {error}", file=sys.stderr)
    except ModuleNotFoundError as error:
        if (error.name or "superblock").partition(".")[0] == "superblock":
            raise
        print(f"{name}: needs {error.name}: pip install 'superblock[vision]'", file=sys.stderr)
    return 2


def usage() -> str:
    """The list of commands."""
    lines = [f"  {name.ljust(10)} {purpose}" for name, purpose in COMMANDS.items()]
    return "\n".join(["usage: superblock <command> [options]", "", *lines, "", "superblock <command> --help says more"])
