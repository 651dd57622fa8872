"""``superblock train``: train a model, dense or with block masks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import get_args

from superblock.cli.options import Parser
from superblock.cli.running import add_run_options, average_config, data_options, eval_config, given, run_options
from superblock.errors import ConfigError
from superblock.training.assess import assess
from superblock.training.config import (
    AutoAugment,
    DataConfig,
    OptimizerConfig,
    OptimizerName,
    ScheduleConfig,
    ScheduleName,
    TrainConfig,
    WarmupName,
)
from superblock.training.fit import fit
from superblock.training.state import find_checkpoint

OPTIMIZER_OPTIONS = [field.name for field in fields(OptimizerConfig)]
INTERRUPTED = 130  # What shells give a command that Ctrl-C ended.
TRAIN_OPTIONS = [field.name for field in fields(TrainConfig)]


def parser() -> argparse.ArgumentParser:
    """The command's arguments; names and defaults are those of torchvision's reference training."""
    parser = Parser(
        prog="superblock train",
        description="Train a model, dense or with block masks; under torchrun, on several processes.",
    )
    add_run_options(parser, epochs="passes over the training images")
    group = parser.add_argument_group("augmentation")
    group.add_argument(
        "--train-crop-size", type=int, metavar="N", help="side of an image (default: 224, or the data's)"
    )
    group.add_argument("--auto-augment", choices=get_args(AutoAugment), help="policy")
    group.add_argument("--ra-magnitude", type=int, default=9, metavar="N", help="of ra (default: %(default)s)")
    group.add_argument("--augmix-severity", type=int, default=3, metavar="N", help="of augmix (default: %(default)s)")
    group.add_argument(
        "--random-erase", type=float, default=0.0, metavar="P", help="probability of an erased rectangle"
    )
    group.add_argument("--mixup-alpha", type=float, default=0.0, metavar="A", help="mix images; 0 does not")
    group.add_argument("--cutmix-alpha", type=float, default=0.0, metavar="A", help="paste images; 0 does not")
    group.add_argument("--ra-sampler", action="store_true", help="repeated augmentation")
    group.add_argument("--ra-reps", type=int, default=3, metavar="N", help="repetitions of that (default: %(default)s)")
    group = parser.add_argument_group("optimization")
    group.add_argument("--opt", choices=get_args(OptimizerName), default="sgd", help="default: %(default)s")
    group.add_argument("--lr", type=float, default=0.1, help="learning rate (default: %(default)s)")
    group.add_argument(
        "--sparsity-ramp",
        type=float,
        default=0.5,
        metavar="F",
        help="share of the run over which sparsity grows, the largest tiles staying (default: %(default)s)",
    )
    group.add_argument(
        "--score-lr", type=float, metavar="LR", help="train the masks' scores at this rate instead; no ramp then"
    )
    group.add_argument("--momentum", type=float, default=0.9, help="default: %(default)s")
    group.add_argument("--weight-decay", "--wd", type=float, default=1e-4, metavar="W", help="default: %(default)s")
    group.add_argument("--norm-weight-decay", type=float, metavar="W", help="of normalizations (default: --wd)")
    group.add_argument("--bias-weight-decay", type=float, metavar="W", help="of biases (default: --wd)")
    group.add_argument("--transformer-embedding-decay", type=float, metavar="W", help="of embeddings (default: --wd)")
    group.add_argument("--clip-grad-norm", type=float, metavar="N", help="largest norm of the gradient")
    group.add_argument("--accumulation-steps", type=int, default=1, metavar="N", help="batches to an update")
    group.add_argument("--lr-scheduler", choices=get_args(ScheduleName), default="steplr", help="default: %(default)s")
    group.add_argument("--lr-step-size", type=int, default=30, metavar="N", help="epochs to a step of steplr")
    group.add_argument("--lr-gamma", type=float, default=0.1, metavar="G", help="factor of steplr and exponentiallr")
    group.add_argument("--lr-min", type=float, default=0.0, metavar="LR", help="where cosineannealinglr ends")
    group.add_argument("--lr-warmup-epochs", type=int, default=0, metavar="N", help="default: %(default)s")
    group.add_argument(
        "--lr-warmup-method", choices=get_args(WarmupName), default="constant", help="default: %(default)s"
    )
    group.add_argument("--lr-warmup-decay", type=float, default=0.01, metavar="F", help="where warm-up starts")
    group = parser.add_argument_group("checkpoints")
    group.add_argument("--output-dir", default=".", metavar="DIR", help="checkpoints and metrics; '' writes nothing")
    group.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="PATH",
        help="go on from a checkpoint, or the newest of a folder (auto, or no PATH: of --output-dir)",
    )
    group.add_argument("--start-epoch", type=int, default=0, metavar="N", help="without --resume (default: 0)")
    group.add_argument("--keep-checkpoints", type=int, metavar="N", help="how many model_<epoch>.pth (default: all)")
    group.add_argument("--tensorboard", action="store_true", help="write events beside metrics.jsonl")
    group.add_argument("--test-only", action="store_true", help="evaluate the checkpoint of --resume or --weights-path")
    return parser


def train_config(args: argparse.Namespace) -> TrainConfig:
    """The run that the arguments stand for."""
    schedule = ScheduleConfig(
        name=args.lr_scheduler,
        step_size=args.lr_step_size,
        gamma=args.lr_gamma,
        min_lr=args.lr_min,
        warmup_epochs=args.lr_warmup_epochs,
        warmup_method=args.lr_warmup_method,
        warmup_decay=args.lr_warmup_decay,
    )
    options = {**given(args, TRAIN_OPTIONS), **run_options(args), "output_dir": args.output_dir or None}
    return TrainConfig(
        **options,
        data=DataConfig(**data_options(args)),
        optimizer=OptimizerConfig(name=args.opt, **given(args, OPTIMIZER_OPTIONS)),
        schedule=schedule,
        average=average_config(args),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    config = train_config(args)
    if args.test_only:
        found = find_checkpoint(config.resume, config.output_dir)
        for notice in found.notices:
            print(notice)
        assess(eval_config(args, config.data, weights_path=found.path or config.weights_path))
        return 0
    if args.sparsify_weights or args.bfloat16 or args.float16:
        raise ConfigError(
            "--sparsify-weights, --bsr, --bfloat16 and --float16 are for evaluation: "
            "add --test-only, or give them to evaluate after training"
        )
    try:
        fit(config)
    except KeyboardInterrupt:
        print("train: interrupted: the same line with --resume goes on from the last checkpoint", file=sys.stderr)
        return INTERRUPTED
    return 0
