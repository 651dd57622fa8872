"""``superblock convert``: writes a trained checkpoint as a deployable safetensors model."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from superblock.checkpoint import save
from superblock.cli.building import build_model
from superblock.cli.options import Parser, add_sparsity_options, check_conversion, supermask_config
from superblock.errors import ConfigError
from superblock.files import check_writable
from superblock.inspection import model_report
from superblock.nn import BSRWeight
from superblock.report import Report
from superblock.weights import open_weights, take_form


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = Parser(
        prog="superblock convert",
        description="Fold a checkpoint's masks, store the layers as BSR and write them as safetensors, which "
        "evaluate, benchmark and superblock.load take.",
    )
    parser.add_argument("checkpoint", help="a checkpoint (.pth), or hf://owner/name/file")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="where to: *.safetensors")
    parser.add_argument("--model", help="a torchvision model, or timm:<name> (default: as the checkpoint says)")
    parser.add_argument("--bsr", type=int, default=0, metavar="N", help="store N×N blocks (default: the tile)")
    parser.add_argument("--model-ema", action="store_true", help="convert the averaged model (EMA)")
    parser.add_argument("--image-size", type=int, metavar="N", help="side of an image, where the checkpoint is silent")
    add_sparsity_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    config = supermask_config(args)
    args.sparsify_weights = True
    check_conversion(args, config)
    if args.output.suffix != ".safetensors":
        raise ConfigError(f"--output must name a .safetensors file, got {args.output}")
    check_writable(args.output)
    file = open_weights(args.checkpoint)
    built = build_model(args.model, file, image_size=args.image_size)
    loaded = file.load_into(built.model, config, ema=args.model_ema)
    for notice in loaded.notices:
        print(notice)
    if loaded.form == "dense":
        raise ConfigError(f"{args.checkpoint} has no masks to convert: give --sparsity-linear, or a masked checkpoint")
    if (converted := take_form(built.model.eval(), True, args.bsr)) is not None:
        print("".join(f"{note}\n" for note in converted.notes), end="")
    report = model_report(built.model)
    save(
        built.model,
        args.output,
        architecture=built.architecture,
        num_classes=built.num_classes,
        image_size=built.image_size,
        supermask=None if loaded.supermask is None else loaded.supermask.to_dict(),
    )
    print(report)
    print("\n".join(_sizes(built.model, report, args.output)))
    return 0


def _sizes(model: nn.Module, report: Report, path: Path) -> list[str]:
    """The bytes of the masked weights, dense and stored, and of the file."""
    stored = sum(layer.matrix.nbytes for layer in model.modules() if isinstance(layer, BSRWeight))
    blocks = sum(layer.matrix.nnz * layer.values[0].nbytes for layer in model.modules() if isinstance(layer, BSRWeight))
    dense = sum(
        math.prod(layer.weight_shape) * layer.values.element_size()
        for layer in model.modules()
        if isinstance(layer, BSRWeight)
    )
    lines = [f"wrote {path}: {_megabytes(path.stat().st_size)}"]
    if dense:
        lines.append(
            f"block-sparse weights: {_megabytes(stored)} of {_megabytes(dense)} dense ({stored / dense:.1%}, "
            f"indices {_megabytes(stored - blocks)}) at density {1 - report.masked_sparsity:.1%}"
        )
    return lines


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB"
