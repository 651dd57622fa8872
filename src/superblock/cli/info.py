"""``superblock info``: what runs here, and why other things do not."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import torch

from superblock.benchmarking import describe_machine
from superblock.cli.options import Parser
from superblock.ops.status import describe
from superblock.report import text_table

OPTIONAL = (
    "torchvision",
    "timm",
    "huggingface-hub",
    "safetensors",
    "torchmetrics",
    "matplotlib",
    "rich",
    "tensorboard",
)


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    return Parser(prog="superblock info", description="Say which backends are active here, and why others are not.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser().parse_args(argv)
    machine = describe_machine(torch.device("cpu"))
    print(f"superblock {machine['superblock']}, torch {machine['torch']}, Python {machine['python']}")
    print(
        f"CPU: {machine['cpu']}, {os.cpu_count()} logical cores, {machine['threads']} threads, "
        f"torch uses {machine['cpu_capability']}"
    )
    print("\n".join(_gpus()))
    rows = [(status.name, "active" if status.active else "not active", status.detail) for status in describe()]
    print("\n".join(text_table(("backend", "state", "detail"), rows)))
    print("packages: " + ", ".join(_installed(name) for name in OPTIONAL))
    return 0


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return ["GPU: none that torch can use"]
    names = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        f"GPU {index}: {found.name}, compute capability {found.major}.{found.minor}, "
        f"{found.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
        for index, found in enumerate(names)
    ]


def _installed(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} missing"
