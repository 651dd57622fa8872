"""``superblock download``: lists the published weights, or fetches one of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from superblock import hub
from superblock.cli.options import Parser
from superblock.errors import ConfigError


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = Parser(
        prog="superblock download",
        description="List the published weights, or fetch one from the Hugging Face hub (HF_ENDPOINT is honoured). "
        "An interrupted download goes on where it stopped.",
    )
    parser.add_argument("name", nargs="?", help="which weights, such as sp0.80-ts32; without it they are listed")
    parser.add_argument(
        "--output-dir", type=Path, default=Path("checkpoints"), metavar="DIR", help="(default: %(default)s)"
    )
    parser.add_argument("--repo", default=hub.REPOSITORY, metavar="OWNER/NAME", help="(default: %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    if args.name is None:
        print("\n".join(_listing()))
        return 0
    name = args.name.removesuffix(".pth")
    if name not in hub.PUBLISHED and args.repo == hub.REPOSITORY:
        raise ConfigError(f"no published weights {args.name!r}: expected one of {', '.join(hub.PUBLISHED)}")
    target = args.output_dir / hub.local_name(name, args.repo)
    print(f"fetching {args.repo}/checkpoints/{name}.pth from {hub.endpoint()}", flush=True)
    fetched = hub.download(args.repo, f"checkpoints/{name}.pth", target)
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB{'' if fetched else ', was there already'}")
    return 0


def _listing() -> list[str]:
    sparse = [f"  {'  '.join(f'sp{sparsity}-ts{tile}' for tile in hub.TILES)}" for sparsity in hub.SPARSITIES]
    return [
        f"ViT-B/16 on ImageNet-1k (faces blurred), published as {hub.REPOSITORY}:",
        "  baseline                             dense",
        *sparse,
        "sp: sparsity of the linear layers, ts: side of a tile",
        "fetch one with: superblock download sp0.80-ts32",
    ]
