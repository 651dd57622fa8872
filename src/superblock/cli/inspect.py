"""``superblock inspect``: reports the sparsity of any checkpoint and draws its masks."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from superblock.cli.building import build_model
from superblock.cli.options import Parser, add_sparsity_options, supermask_config
from superblock.files import check_writable
from superblock.inspection import layer_masks, model_report
from superblock.weights import open_weights


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = Parser(
        prog="superblock inspect",
        description="Report what is sparse in a checkpoint, and draw the mask of each weight.",
    )
    parser.add_argument(
        "checkpoint", help="a checkpoint (.pth), a deployable model (.safetensors), hf://owner/name/file"
    )
    parser.add_argument("--model", help="a torchvision model, or timm:<name> (default: as the checkpoint says)")
    parser.add_argument("--model-ema", action="store_true", help="inspect the averaged model (EMA)")
    parser.add_argument("--image-size", type=int, metavar="N", help="side of an image, where the checkpoint is silent")
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help="write one picture a weight here (PNG)")
    add_sparsity_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    config = supermask_config(args)
    if args.output_dir is not None:
        check_writable(args.output_dir / "picture.png")
    file = open_weights(args.checkpoint)
    built = build_model(args.model, file, image_size=args.image_size)
    loaded = file.load_into(built.model, config, ema=args.model_ema)
    print(f"{file.source}: {built.architecture}, {loaded.form}")
    for notice in loaded.notices:
        print(notice)
    report = model_report(built.model)
    print(report if report.layers else f"no weight is masked ({report.parameters:,} parameters)")
    if args.output_dir is not None:
        from superblock.pictures import draw_masks

        drawn = draw_masks(layer_masks(built.model), args.output_dir)
        print(f"wrote {len(drawn)} pictures to {args.output_dir}")
    return 0
