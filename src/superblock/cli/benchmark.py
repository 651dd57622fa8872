"""``superblock benchmark``: verifies that a model's forms agree, then times it, alone or beside its dense twin."""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from superblock.benchmarking import Timing, describe_machine, is_convolutional, measure
from superblock.cli.building import Built, build_model
from superblock.cli.options import (
    Parser,
    add_conversion_options,
    add_model_options,
    add_sparsity_options,
    check_conversion,
    resolve_device,
    supermask_config,
)
from superblock.config import SupermaskConfig
from superblock.errors import ConfigError
from superblock.files import check_writable, write_atomically
from superblock.report import Report, text_table
from superblock.surgery import apply_supermask
from superblock.threads import use_threads
from superblock.verification import Verification, cast, verify_forms
from superblock.weights import WeightsFile, open_weights

COMPARISONS = ("dense", "compiled")
DEFAULT_MODEL = "vit_b_16"


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = Parser(
        prog="superblock benchmark",
        description="Time a model, dense or block-sparse. The median latency of a batch goes to stderr as '<n> ms'.",
    )
    add_model_options(parser)
    parser.set_defaults(model=None)
    parser.add_argument("--batch-size", "-b", type=int, default=32, metavar="N", help="images a batch (default: 32)")
    parser.add_argument(
        "--val-crop-size", type=int, default=None, metavar="N", help="side of an image (default: the file's, else 224)"
    )
    add_sparsity_options(parser)
    add_conversion_options(parser)
    group = parser.add_argument_group("arithmetic")
    group.add_argument("--bfloat16", action="store_true", help="weights and activations in bfloat16")
    group.add_argument("--float16", action="store_true", help="weights and activations in float16")
    group.add_argument("--compile", action="store_true", help="compile the model with torch.compile")
    group.add_argument("--threads", type=int, default=None, metavar="N", help="CPU threads (default: torch's choice)")
    group = parser.add_argument_group("measurement")
    group.add_argument("--warmup", type=int, default=None, metavar="N", help="untimed runs (default: up to 10)")
    group.add_argument(
        "--iters", type=int, default=None, metavar="N", help="timed runs (default: what fits in 20 s, 3 to 100)"
    )
    group.add_argument("--seed", type=int, default=0, help="of the random weights and images (default: %(default)s)")
    group.add_argument(
        "--compare",
        type=_comparisons,
        default=(),
        metavar="dense,compiled",
        help="time the dense model, eager or compiled, in turn with this one",
    )
    group.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured here")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    config = supermask_config(args)
    check_conversion(args, config)
    _check(args)
    use_threads(args.threads)
    device = resolve_device(args.device)
    torch.manual_seed(args.seed)
    file = open_weights(args.weights_path) if args.weights_path else None
    built = build_model(args.model, file, weights=args.weights, image_size=args.val_crop_size, default=DEFAULT_MODEL)
    dtype = torch.bfloat16 if args.bfloat16 else torch.float16 if args.float16 else torch.float32
    if file is None and args.weights is None:
        _fill_zero_weights(built.model)
    layout = torch.channels_last if is_convolutional(built.model) else torch.contiguous_format
    built.model.to(memory_format=layout)
    dense = copy.deepcopy(built.model) if args.compare else None
    _load(built, file, config)
    model = built.model.eval().to(device)
    images = torch.randn(args.batch_size, 3, built.image_size, built.image_size).to(device, dtype, memory_format=layout)
    size = f"{built.image_size} × {built.image_size}"
    order = ", channels-last" if layout == torch.channels_last else ""
    print(f"{built.architecture}, batch {args.batch_size}, {size}, {dtype}, {device}{order}", flush=True)
    verification, report = verify_forms(model, images[:2], dtype, args.sparsify_weights, args.bsr)
    print("\n".join([*([str(report)] if report.layers else []), *verification.lines()]), flush=True)
    with torch.inference_mode():
        calls = _calls(args, model, dense, images, dtype)
        timings = measure(calls, device, warmup=args.warmup, iterations=args.iters, progress=_say)
    print("\n".join(_table(timings)))
    if args.json:
        _write(args, built, device, dtype, report, verification, timings)
    print(f"{timings['model'].median:.3f} ms", file=sys.stderr)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raise :class:`ConfigError` for numbers that cannot be meant, before anything is built."""
    for name, least in (("batch_size", 1), ("val_crop_size", 1), ("iters", 1), ("warmup", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if args.bfloat16 and args.float16:
        raise ConfigError("--bfloat16 and --float16 exclude each other: give one of them")
    if args.json:
        check_writable(args.json)


def _load(built: Built, file: WeightsFile | None, config: SupermaskConfig) -> None:
    """Put weights and masks on the model."""
    if file is not None:
        for notice in file.load_into(built.model, config).notices:
            print(notice)
    elif config.active:
        apply_supermask(built.model, config)


def _fill_zero_weights(model: nn.Module) -> None:
    """Give weights that start at zero, as many heads do, random values: zero hides every difference between forms."""
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)


def _calls(
    args: argparse.Namespace, model: nn.Module, dense: nn.Module | None, images: Tensor, dtype: torch.dtype
) -> dict[str, Callable[[], object]]:
    """What is timed: the model, and beside it its dense twin, eager or compiled."""
    timed: dict[str, Any] = {"model": torch.compile(model) if args.compile else model}
    if dense is not None:
        cast(dense.eval().to(images.device), dtype)
        twins = {"dense": lambda: dense, "compiled": lambda: torch.compile(dense)}
        timed |= {name: twins[name]() for name in args.compare}
    return {name: (lambda module=module: module(images)) for name, module in timed.items()}  # type: ignore[misc]


def _table(timings: dict[str, Timing]) -> list[str]:
    own = timings["model"].median
    rows = [
        (
            name,
            f"{timing.median:.3f}",
            f"{timing.quantile(0.25):.3f}",
            f"{timing.quantile(0.75):.3f}",
            str(len(timing.samples)),
            f"{timing.median / own:.2f}×",
        )
        for name, timing in timings.items()
    ]
    return text_table(("ms a batch", "median", "quartile 1", "quartile 3", "runs", "ratio to model"), rows)


def _write(
    args: argparse.Namespace,
    built: Built,
    device: torch.device,
    dtype: torch.dtype,
    report: Report,
    verification: Verification,
    timings: dict[str, Timing],
) -> None:
    content = {
        "machine": describe_machine(device),
        "flags": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "architecture": built.architecture,
        "image_size": built.image_size,
        "dtype": str(dtype).removeprefix("torch."),
        "report": report.to_dict(),
        "verification": verification.to_dict(),
        "timings": {name: timing.to_dict() for name, timing in timings.items()},
    }
    text = json.dumps(content, indent=2)
    write_atomically(args.json, lambda temporary: temporary.write_text(f"{text}\n", encoding="utf-8"))
    print(f"wrote {args.json}")


def _say(line: str) -> None:
    print(line, flush=True)


def _comparisons(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in COMPARISONS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"expected some of {','.join(COMPARISONS)}, got {text!r}")
    return names
