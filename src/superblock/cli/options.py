"""Arguments that several commands share, and the configurations they stand for."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

import torch

from superblock.config import SupermaskConfig, TileSparsity
from superblock.convert import check_block
from superblock.errors import BackendError, ConfigError

DEFAULT_TILE = 32
DEFAULT_DEVICE = "cuda"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog.rpartition(' ')[2]}: {message}: see --help\n")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which model, with which weights, where."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="vit_b_16", help="a torchvision model, or timm:<name>")
    group.add_argument(
        "--weights", help="pretrained weights by torchvision's name (IMAGENET1K_V1, DEFAULT) or timm's tag"
    )
    group.add_argument(
        "--weights-path",
        metavar="FILE",
        help="a checkpoint (.pth), a deployable model (.safetensors) or hf://owner/name/file",
    )
    group.add_argument("--device", default=DEFAULT_DEVICE, help="cpu, cuda, cuda:1 (default: %(default)s)")


def add_sparsity_options(parser: argparse.ArgumentParser) -> None:
    """What to make sparse, and how far to take it."""
    group = parser.add_argument_group("sparsity")
    for kind, noun in (("linear", "linear layers"), ("conv1x1", "1×1 convolutions"), ("conv", "other convolutions")):
        group.add_argument(
            f"--sparsity-{kind}",
            type=float,
            default=None,
            metavar="S",
            help=f"share of dead tiles in {noun}, in [0, 1)",
        )
        group.add_argument(
            f"--sp-{kind}-tile-size",
            type=int,
            default=DEFAULT_TILE,
            metavar="T",
            help="side of a tile (default: %(default)s)",
        )
    group.add_argument("--skip-last-layer-sparsity", action="store_true", help="keep the last linear layer dense")
    group.add_argument(
        "--skip-first-transformer-sparsity", action="store_true", help="keep the first transformer block dense"
    )
    group.add_argument("--sp-scope", choices=("all", "mlp"), default="all", help="mlp: feed-forward layers only")
    group.add_argument("--sp-include", nargs="+", default=(), metavar="PATTERN", help="only layers whose name matches")
    group.add_argument("--sp-exclude", nargs="+", default=(), metavar="PATTERN", help="no layer whose name matches")


def add_conversion_options(parser: argparse.ArgumentParser) -> None:
    """Folding and BSR."""
    group = parser.add_argument_group("conversion")
    group.add_argument("--sparsify-weights", action="store_true", help="fold the masks into the weights")
    group.add_argument(
        "--bsr",
        type=int,
        nargs="?",
        const=0,
        default=None,
        metavar="N",
        help="store folded layers in N×N blocks (default: the tile)",
    )


def supermask_config(args: argparse.Namespace) -> SupermaskConfig:
    """The configuration that the sparsity arguments stand for: a sparsity of 0 or none leaves the kind dense."""
    targets: dict[str, Any] = {}
    for kind in ("linear", "conv1x1", "conv"):
        tile = getattr(args, f"sp_{kind}_tile_size")
        target = TileSparsity(getattr(args, f"sparsity_{kind}") or 0.0, tile)
        targets[kind] = target if target.sparsity > 0 else None
    return SupermaskConfig(
        **targets,
        skip_last_layer=args.skip_last_layer_sparsity,
        skip_first_transformer=args.skip_first_transformer_sparsity,
        scope=args.sp_scope,
        include=tuple(args.sp_include),
        exclude=tuple(args.sp_exclude),
    )


def check_conversion(args: argparse.Namespace, config: SupermaskConfig) -> None:
    """Raise :class:`ConfigError` where ``--bsr`` has nothing to work on or does not fit the tiles."""
    if args.bsr is None:
        return
    if not args.sparsify_weights:
        raise ConfigError("--bsr needs --sparsify-weights: only folded weights can be stored in blocks")
    for kind in ("linear", "conv1x1", "conv"):
        target = config.target(kind)
        if target is not None:
            check_block(args.bsr or None, target.tile_size)


def resolve_device(name: str) -> torch.device:
    """The device of a name, or one clear line: unknown, or CUDA asked for and absent."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {name!r}: expected cpu, cuda or cuda:<index>") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        default = " (the default)" if name == DEFAULT_DEVICE else ""
        raise BackendError(f"--device {name}{default} needs a CUDA GPU, and torch sees none here: use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BackendError(f"--device {name} was asked for, but there are only {torch.cuda.device_count()} GPUs")
    return device
