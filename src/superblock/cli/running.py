"""Arguments that training and evaluation share, and the configurations they stand for."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any, get_args

from superblock.cli.options import (
    add_conversion_options,
    add_model_options,
    add_sparsity_options,
    check_conversion,
    resolve_device,
    supermask_config,
)
from superblock.errors import ConfigError
from superblock.training.config import (
    AverageConfig,
    DataConfig,
    DatasetName,
    EvalConfig,
    Interpolation,
    RunConfig,
    SplitName,
)

DATA_OPTIONS = [field.name for field in fields(DataConfig)]
RUN_OPTIONS = [field.name for field in fields(RunConfig)]


def add_run_options(parser: argparse.ArgumentParser, epochs: str) -> None:
    """All that training and evaluation have in common; ``epochs`` says what theirs are for."""
    add_model_options(parser)
    parser.set_defaults(model=None)
    add_sparsity_options(parser)
    add_conversion_options(parser)
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", choices=get_args(DatasetName), default="imagefolder", help="default: %(default)s")
    group.add_argument(
        "--data-path",
        metavar="DIR",
        help="imagefolder: holds train/ and val/, each with a folder a class (default: data); "
        "fashion-mnist: holds the four .gz files (default: where Debian's dataset-fashion-mnist puts them)",
    )
    group.add_argument("--split", choices=get_args(SplitName), default="val", help="what to evaluate on (default: val)")
    group.add_argument("--batch-size", "-b", type=int, default=32, metavar="N", help="images a process (default: 32)")
    group.add_argument("--workers", "-j", type=int, metavar="N", help="loading processes (default: the CPUs, up to 16)")
    group.add_argument("--cache-dataset", action="store_true", help="keep the list of a folder's files for next time")
    group.add_argument("--interpolation", choices=get_args(Interpolation), default="bilinear", help="of resizing")
    group.add_argument("--val-resize-size", type=int, metavar="N", help="shorter side before the crop (default: 256)")
    group.add_argument("--val-crop-size", type=int, metavar="N", help="side of an image (default: 224, or the data's)")
    group = parser.add_argument_group("run")
    group.add_argument("--epochs", type=int, default=90, metavar="N", help=f"{epochs} (default: %(default)s)")
    group.add_argument("--label-smoothing", type=float, default=0.0, metavar="S", help="of the loss")
    group.add_argument("--amp", action="store_true", help="mixed precision: float16 on GPUs, bfloat16 on CPUs")
    group.add_argument("--bfloat16", action="store_true", help="evaluate in bfloat16")
    group.add_argument("--float16", action="store_true", help="evaluate in float16")
    group.add_argument("--model-ema", action="store_true", help="the exponential moving average of the weights")
    group.add_argument("--model-ema-steps", type=int, default=32, metavar="N", help="updates of the weights to one")
    group.add_argument("--model-ema-decay", type=float, default=0.99998, metavar="D", help="before adjustment")
    group.add_argument("--sync-bn", action="store_true", help="batch normalization over all processes (GPUs)")
    group.add_argument("--print-freq", type=int, default=10, metavar="N", help="steps between lines of progress")
    group.add_argument("--use-deterministic-algorithms", action="store_true", help="only deterministic ones, or fail")
    group.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    group.add_argument("--world-size", type=int, default=1, metavar="N", help="processes, where Slurm starts them")
    group.add_argument(
        "--dist-url", default="env://", metavar="URL", help="where processes meet (default: %(default)s)"
    )


def given(args: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    """Those of the fields that the command has an argument for, by that name."""
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def data_options(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a :class:`DataConfig`."""
    return {**given(args, DATA_OPTIONS), "path": args.data_path, "cache": args.cache_dataset}


def run_options(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a :class:`RunConfig` but its data; the device is known to be there."""
    supermask = supermask_config(args)
    check_conversion(args, supermask)
    resolve_device(args.device)
    deterministic = args.use_deterministic_algorithms
    return {**given(args, RUN_OPTIONS), "supermask": supermask, "deterministic": deterministic}


def average_config(args: argparse.Namespace) -> AverageConfig | None:
    """The average that was asked for."""
    average = AverageConfig(args.model_ema_steps, args.model_ema_decay)
    return average if args.model_ema else None


def eval_config(args: argparse.Namespace, data: Any, **changes: Any) -> EvalConfig:
    """The evaluation that the arguments stand for."""
    if args.bfloat16 and args.float16:
        raise ConfigError("--bfloat16 and --float16 exclude each other: give one of them")
    options: dict[str, Any] = {
        **run_options(args),
        "data": data,
        "sparsify_weights": args.sparsify_weights,
        "bsr": args.bsr,
        "average": average_config(args) is not None,
        "dtype": "bfloat16" if args.bfloat16 else "float16" if args.float16 else "float32",
    }
    return EvalConfig(**{**options, **changes})
