"""``superblock evaluate``: the accuracy of a model, with its masks online, folded, or as BSR."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from superblock.cli.options import Parser
from superblock.cli.running import add_run_options, data_options, eval_config
from superblock.training.assess import assess
from superblock.training.config import DataConfig


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = Parser(
        prog="superblock evaluate",
        description="Measure a model's accuracy. Each image counts once at any number of processes.",
    )
    add_run_options(parser, epochs="taken for the sake of training's lines, without effect here")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    assess(eval_config(args, DataConfig(**data_options(args))))
    return 0
