"""What the tests of the commands share: a way to run them in this process, and checkpoints to run them on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from superblock import SupermaskConfig, TileSparsity, apply_supermask, models, score_parameters
from superblock.cli.main import main
from superblock.files import write_checkpoint

CONFIG = SupermaskConfig(linear=TileSparsity(0.9, 16))
ORIGINAL = Path(__file__).parent / "data" / "original"
ORIGINAL_MODEL = "vit:image_size=32,patch_size=8,num_layers=3,num_heads=4,hidden_dim=64,mlp_dim=128"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of ``superblock <arguments>``; argparse's own exit is a status too."""
    capsys.readouterr()
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line on stderr of a command that refuses its arguments with status 2."""
    status, _, err = run(capsys, *arguments)
    assert status == 2, err
    (line,) = err.strip().splitlines()
    return line


def digits_checkpoint(path: Path, *, ema: bool = False, **said: Any) -> Path:
    """A training checkpoint of a small masked ViT, whose scores are random."""
    torch.manual_seed(0)
    model = models.build("vit_digits", num_classes=10)
    torch.nn.init.normal_(model.get_parameter("heads.head.weight"))
    apply_supermask(model, CONFIG)
    for scores in score_parameters(model):
        torch.nn.init.normal_(scores)
    state = model.state_dict()
    averaged = {"n_averaged": torch.tensor(3), **{f"module.{key}": value.clone() for key, value in state.items()}}
    averaged["module.heads.head.bias"] += 1
    described = {"architecture": "vit_digits", "num_classes": 10, "image_size": 8, "supermask": CONFIG.to_dict()}
    content = {"format": "superblock", "version": 1, "model": state, "epoch": 3, "config": {**described, **said}}
    write_checkpoint(path, content | ({"model_ema": averaged} if ema else {}))
    return path
