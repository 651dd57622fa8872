"""The whole path on handwritten digits: train, fold, convert, evaluate every form, time them, draw."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from superblock import models
from superblock.benchmarking import Timing, describe_machine, measure
from superblock.checkpoint import save
from superblock.config import SupermaskConfig, TileSparsity
from superblock.convert import to_bsr
from superblock.files import write_atomically
from superblock.inspection import layer_masks, model_report
from superblock.pictures import draw_accuracy, draw_latency, draw_masks
from superblock.report import Report, text_table
from superblock.surgery import apply_supermask, sparsify_weights
from superblock.training import (
    DataConfig,
    EvalConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
    TrainResult,
    assess,
    fit,
)
from superblock.verification import verify_forms

MODEL = "vit_digits"
TILE = 16
SPARSITIES = (0.8, 0.9)
CURVE = (0.5, 0.7, 0.8, 0.9, 0.95)
EPOCHS = 40
BATCH = 256
CPU = torch.device("cpu")

Say = Callable[[str], object]
Key = tuple[str, str]


@dataclass(frozen=True)
class Row:
    """One form of one model: accuracy in per cent, sizes in bytes, the median latency of a batch in milliseconds."""

    model: str
    form: str
    accuracy: float
    masked_sparsity: float
    model_sparsity: float
    file_bytes: int
    latency_ms: float
    ratio_to_dense: float


def run(folder: Path, *, epochs: int = EPOCHS, seed: int = 0, threads: int | None = None, say: Say = print) -> None:
    """Train the dense model and its sparse twins, compare all forms, and write everything to ``folder``.

    Raises:
        ModelError: masked, folded and BSR outputs differ by more than 1e-4.
        CheckpointError: the folder cannot be written.
    """
    results: dict[str, TrainResult] = {}
    for sparsity in (0.0, *SPARSITIES):
        name = name_of(sparsity)
        say(f"training {MODEL}, {name}: {epochs} epochs on handwritten digits")
        config = train_config(sparsity, folder / "checkpoints" / slug(name), epochs, seed, threads)
        results[name] = fit(config, quiet=True)
        say(f"  accuracy {results[name].history[-1]['val_acc1']:.2f} %")
    forms, reports, differences = _forms(results, folder)
    timings = _latencies(forms, seed)
    rows = [_row(key, folder, reports[key], timings[key], timings["dense", "dense"], seed, threads) for key in forms]
    curve = _latency_curve(seed)
    _draw(results, curve, folder)
    lines = table(rows)
    content = {
        "machine": describe_machine(CPU),
        "command": f"superblock demo --epochs {epochs} --seed {seed}",
        "epochs": epochs,
        "batch": BATCH,
        "rows": [asdict(row) for row in rows],
        "largest_difference_between_forms": differences,
        "latency_against_sparsity": curve,
        "timings": {" ".join(key): timing.to_dict() for key, timing in timings.items()},
        "history": {name: result.history for name, result in results.items()},
    }
    _write(folder / "demo.json", json.dumps(content, indent=2))
    _write(folder / "demo.md", "\n".join(lines))
    say("")
    say("\n".join(lines))


def train_config(sparsity: float, folder: Path, epochs: int, seed: int, threads: int | None) -> TrainConfig:
    """How the demo trains: all alike but for the masks, which leave the ten-output head dense."""
    return TrainConfig(
        model=MODEL,
        supermask=masks(sparsity) if sparsity else SupermaskConfig(),
        data=DataConfig(dataset="digits", batch_size=32, workers=0),
        optimizer=OptimizerConfig(name="adamw", lr=1e-3, weight_decay=0.3, clip_grad_norm=1.0),
        schedule=ScheduleConfig(
            name="cosineannealinglr", warmup_epochs=min(4, epochs - 1), warmup_method="linear", warmup_decay=0.1
        ),
        label_smoothing=0.1,
        epochs=epochs,
        output_dir=str(folder),
        keep_checkpoints=0,
        seed=seed,
        threads=threads,
    )


def masks(sparsity: float) -> SupermaskConfig:
    """What every sparse model of the demo masks: all linear layers but the head."""
    return SupermaskConfig(linear=TileSparsity(sparsity, TILE), skip_last_layer=True)


def name_of(sparsity: float) -> str:
    """``dense``, ``80 %``, ``90 %``."""
    return f"{sparsity:.0%}".replace("%", " %") if sparsity else "dense"


def slug(name: str) -> str:
    """A model's name as part of a path: ``dense``, ``80``, ``90``."""
    return name.removesuffix(" %")


def table(rows: list[Row]) -> list[str]:
    """The comparison as a Markdown table, its cells aligned."""
    header = (
        "model",
        "form",
        "accuracy",
        "sparsity of masked layers",
        "of the model",
        "file",
        f"latency, batch {BATCH}",
        "to dense",
    )
    cells = [
        (
            row.model,
            row.form,
            f"{row.accuracy:.2f} %",
            f"{row.masked_sparsity:.1%}",
            f"{row.model_sparsity:.1%}",
            f"{row.file_bytes / 1e6:.2f} MB",
            f"{row.latency_ms:.2f} ms",
            f"{row.ratio_to_dense:.2f}×",
        )
        for row in rows
    ]
    title, rule, *body = text_table(header, cells, separator=" | ")
    note = "The file of a masked model is its training checkpoint, with the optimizer's state."
    return [*(f"| {line.ljust(len(rule))} |" for line in (title, rule, *body)), "", note]


def _forms(
    results: dict[str, TrainResult], folder: Path
) -> tuple[dict[Key, nn.Module], dict[Key, Report], dict[str, float]]:
    """Every trained model in every form, saved as safetensors where its masks are folded."""
    forms: dict[Key, nn.Module] = {}
    reports: dict[Key, Report] = {}
    differences: dict[str, float] = {}
    images = torch.randn(16, 3, 8, 8)
    for name, result in results.items():
        model = result.model.eval()
        if name == "dense":
            forms[name, "dense"] = model
        else:
            folded, bsr = copy.deepcopy(model), copy.deepcopy(model)
            sparsify_weights(folded)
            verification, _ = verify_forms(bsr, images, torch.float32, sparsify=True, bsr=0)
            differences[name] = verification.largest_difference
            forms |= {(name, "masked"): model, (name, "folded"): folded, (name, "bsr"): bsr}
    for key, model in forms.items():
        reports[key] = model_report(model)
        if key[1] != "masked":
            save(model, _file(folder, key), architecture=MODEL, num_classes=10, image_size=8)
    return forms, reports, differences


def _file(folder: Path, key: Key) -> Path:
    """Where a form is kept: masks online live in the training checkpoint only."""
    if key[1] == "masked":
        return folder / "checkpoints" / slug(key[0]) / "checkpoint.pth"
    return folder / "models" / f"{'-'.join(dict.fromkeys(slug(part) for part in key))}.safetensors"


def _latencies(forms: dict[Key, nn.Module], seed: int) -> dict[Key, Timing]:
    images = torch.randn(BATCH, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        timings = measure({" ".join(key): partial(model, images) for key, model in forms.items()}, CPU)
    return {key: timings[" ".join(key)] for key in forms}


def _row(key: Key, folder: Path, report: Report, timing: Timing, dense: Timing, seed: int, threads: int | None) -> Row:
    """Evaluates the file itself, by the path that ``superblock evaluate`` takes."""
    file = _file(folder, key)
    data = DataConfig(dataset="digits", batch_size=BATCH, workers=0)
    metrics = assess(EvalConfig(weights_path=str(file), data=data, seed=seed, threads=threads), quiet=True)
    return Row(
        model=key[0],
        form=key[1],
        accuracy=metrics.acc1,
        masked_sparsity=report.masked_sparsity,
        model_sparsity=report.model_sparsity,
        file_bytes=file.stat().st_size,
        latency_ms=timing.median,
        ratio_to_dense=dense.median / timing.median,
    )


def _latency_curve(seed: int) -> dict[str, list[tuple[float, float]]]:
    """Latency of the untrained model over sparsity: which tiles live does not matter to the clock."""
    torch.manual_seed(seed)
    dense = models.build(MODEL).eval()
    twins = {0.0: dense}
    for sparsity in CURVE:
        twins[sparsity] = copy.deepcopy(dense)
        apply_supermask(twins[sparsity], masks(sparsity))
        sparsify_weights(twins[sparsity])
        to_bsr(twins[sparsity])
    images = torch.randn(BATCH, 3, 8, 8)
    with torch.inference_mode():
        timings = measure({str(sparsity): partial(model, images) for sparsity, model in twins.items()}, CPU)
    median = {sparsity: timings[str(sparsity)].median for sparsity in twins}
    return {
        "dense": [(0.0, median[0.0]), (CURVE[-1], median[0.0])],
        f"BSR, blocks of {TILE}": [(sparsity, median[sparsity]) for sparsity in CURVE],
    }


def _draw(results: dict[str, TrainResult], curve: dict[str, list[tuple[float, float]]], folder: Path) -> None:
    pictures = folder / "pictures"
    draw_accuracy(
        {name: [record["val_acc1"] for record in result.history] for name, result in results.items()},
        pictures / "accuracy.png",
    )
    draw_latency(curve, pictures / "latency.png")
    for name, result in results.items():
        if name != "dense":
            draw_masks(layer_masks(result.model), pictures / f"masks-{slug(name)}")


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(f"{text}\n", encoding="utf-8"))


def summary(folder: Path, benchmark: dict[str, Any]) -> list[str]:
    """What the model card's benchmark came to, appended to the table in ``folder``."""
    timings = {name: timing["median_ms"] for name, timing in benchmark["timings"].items()}
    ratio = timings["dense"] / timings["model"]
    flags = benchmark["flags"]
    line = (
        f"{benchmark['architecture']}, batch {flags['batch_size']}, {flags['sparsity_linear']:.0%} of "
        f"{flags['sp_linear_tile_size']} × {flags['sp_linear_tile_size']} tiles zero: dense {timings['dense']:.0f} ms, "
        f"BSR {timings['model']:.0f} ms, {ratio:.2f}× as fast"
    )
    path = folder / "demo.md"
    _write(path, "\n".join([path.read_text(encoding="utf-8"), line]))
    return [line, f"tables, checkpoints and pictures are in {folder}/"]
