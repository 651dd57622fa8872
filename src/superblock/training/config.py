"""What a run of training or evaluation is: frozen, validated on construction, stored in every checkpoint.

Names and defaults are those of torchvision's reference training.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from superblock.config import SupermaskConfig
from superblock.errors import ConfigError

DatasetName = Literal["imagefolder", "digits", "fashion-mnist", "fake"]
SplitName = Literal["val", "train", "all"]
Interpolation = Literal["bilinear", "bicubic", "nearest"]
AutoAugment = Literal["ra", "ta_wide", "augmix", "imagenet", "cifar10", "svhn"]
OptimizerName = Literal["sgd", "rmsprop", "adamw"]
ScheduleName = Literal["steplr", "cosineannealinglr", "exponentiallr"]
WarmupName = Literal["constant", "linear"]


@dataclass(frozen=True)
class DataConfig:
    """Which images, how they are cut and augmented, and how many at a time.

    Sizes left at ``None`` are 256 (resize) and 224 (crops) for photographs, and the model's or the data's own for the
    small data sets. ``batch_size`` counts the images of one process. ``split`` says what evaluation looks at.
    """

    dataset: DatasetName = "imagefolder"
    path: str | None = None
    split: SplitName = "val"
    batch_size: int = 32
    workers: int | None = None
    cache: bool = False
    interpolation: Interpolation = "bilinear"
    val_resize_size: int | None = None
    val_crop_size: int | None = None
    train_crop_size: int | None = None
    auto_augment: AutoAugment | None = None
    ra_magnitude: int = 9
    augmix_severity: int = 3
    random_erase: float = 0.0
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    ra_sampler: bool = False
    ra_reps: int = 3

    def __post_init__(self) -> None:
        _one_of(self, "dataset", get_args(DatasetName))
        _one_of(self, "split", get_args(SplitName))
        _one_of(self, "interpolation", get_args(Interpolation))
        _one_of(self, "auto_augment", (None, *get_args(AutoAugment)))
        _at_least(self, 1, "batch_size", "val_resize_size", "val_crop_size", "train_crop_size", "ra_reps")
        _at_least(self, 0, "workers", "ra_magnitude", "random_erase", "mixup_alpha", "cutmix_alpha")
        _at_most(self, 1, "random_erase")
        _at_most(self, 30, "ra_magnitude")
        _at_least(self, 1, "augmix_severity")
        _at_most(self, 10, "augmix_severity")


@dataclass(frozen=True)
class OptimizerConfig:
    """How parameters move. A decay left at ``None`` is ``weight_decay``.

    With a ``score_lr`` the masks' scores are trained; without one they follow the weights (:mod:`.ramp`).
    """

    name: OptimizerName = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    norm_weight_decay: float | None = None
    bias_weight_decay: float | None = None
    transformer_embedding_decay: float | None = None
    score_lr: float | None = None
    clip_grad_norm: float | None = None

    def __post_init__(self) -> None:
        _one_of(self, "name", get_args(OptimizerName))
        _at_least(self, 0, "lr", "momentum", "weight_decay", "norm_weight_decay", "bias_weight_decay")
        _at_least(self, 0, "transformer_embedding_decay", "score_lr")
        _above(self, 0, "clip_grad_norm")


@dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rates change from epoch to epoch."""

    name: ScheduleName = "steplr"
    step_size: int = 30
    gamma: float = 0.1
    min_lr: float = 0.0
    warmup_epochs: int = 0
    warmup_method: WarmupName = "constant"
    warmup_decay: float = 0.01

    def __post_init__(self) -> None:
        _one_of(self, "name", get_args(ScheduleName))
        _one_of(self, "warmup_method", get_args(WarmupName))
        _at_least(self, 1, "step_size")
        _at_least(self, 0, "gamma", "min_lr", "warmup_epochs")
        _above(self, 0, "warmup_decay")
        _at_most(self, 1, "warmup_decay")


@dataclass(frozen=True)
class AverageConfig:
    """The exponential moving average of the weights: how often it is taken, and its decay before adjustment."""

    steps: int = 32
    decay: float = 0.99998

    def __post_init__(self) -> None:
        _at_least(self, 1, "steps")
        _at_least(self, 0, "decay")
        _at_most(self, 1, "decay")


@dataclass(frozen=True)
class RunConfig:
    """What training and evaluation share: the model, its masks, the data, and where it runs.

    Without ``model`` it is the one that ``weights_path`` says it holds, else ViT-B/16.
    """

    model: str | None = None
    weights: str | None = None
    weights_path: str | None = None
    supermask: SupermaskConfig = field(default_factory=SupermaskConfig)
    data: DataConfig = field(default_factory=DataConfig)
    device: str = "cpu"
    amp: bool = False
    label_smoothing: float = 0.0
    print_freq: int = 10
    seed: int = 0
    threads: int | None = None
    deterministic: bool = False
    world_size: int = 1
    dist_url: str = "env://"

    def __post_init__(self) -> None:
        _at_least(self, 0, "label_smoothing", "seed")
        _at_most(self, 1, "label_smoothing")
        _at_least(self, 1, "print_freq", "threads", "world_size")

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, as checkpoints store them."""
        return asdict(self)


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """A whole run of training; without ``output_dir`` nothing is written.

    Unless scores are trained, sparsity grows over the first ``sparsity_ramp`` of the run. ``resume`` is a checkpoint,
    a folder of them, or ``auto`` for those in ``output_dir``. ``keep_checkpoints`` bounds how many
    ``model_<epoch>.pth`` are kept beside ``checkpoint.pth``.
    """

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    average: AverageConfig | None = None
    epochs: int = 90
    start_epoch: int = 0
    sparsity_ramp: float = 0.5
    accumulation_steps: int = 1
    sync_bn: bool = False
    output_dir: str | None = None
    resume: str | None = None
    keep_checkpoints: int | None = None
    tensorboard: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, 1, "epochs", "accumulation_steps")
        _at_least(self, 0, "start_epoch", "keep_checkpoints", "sparsity_ramp")
        _at_most(self, 1, "sparsity_ramp")
        if self.tensorboard and not self.output_dir:
            raise ConfigError("--tensorboard needs --output-dir: its event files go there")
        if self.resume == "auto" and not self.output_dir:
            raise ConfigError("--resume auto needs --output-dir: it continues from the newest checkpoint there")


@dataclass(frozen=True)
class EvalConfig(RunConfig):
    """One evaluation: of the model or of its average, with masks online, folded, or as BSR.

    ``bsr`` is the block's side, 0 for each layer's tile. ``dtype`` is that of weights and images.
    """

    sparsify_weights: bool = False
    bsr: int | None = None
    average: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of(self, "dtype", ("float32", "bfloat16", "float16"))
        if self.bsr is not None and not self.sparsify_weights:
            raise ConfigError("--bsr needs --sparsify-weights: only folded weights can be stored in blocks")
        if self.average and self.weights_path is None:
            raise ConfigError("--model-ema needs --weights-path: the average is in the checkpoint")


def _values(config: object, names: tuple[str, ...]) -> list[tuple[str, float]]:
    found = [(name, getattr(config, name)) for name in names]
    return [(name.replace("_", " "), value) for name, value in found if value is not None]


def _at_least(config: object, least: float, *names: str) -> None:
    for name, value in _values(config, names):
        if not value >= least:
            raise ConfigError(f"{name} must be at least {least}, got {value}")


def _at_most(config: object, most: float, *names: str) -> None:
    for name, value in _values(config, names):
        if not value <= most:
            raise ConfigError(f"{name} must be at most {most}, got {value}")


def _above(config: object, bound: float, *names: str) -> None:
    for name, value in _values(config, names):
        if not value > bound:
            raise ConfigError(f"{name} must be above {bound}, got {value}")


def _one_of(config: object, name: str, choices: tuple[Any, ...]) -> None:
    value = getattr(config, name)
    if value not in choices:
        known = ", ".join(str(choice) for choice in choices if choice is not None)
        raise ConfigError(f"{name.replace('_', ' ')} must be one of {known}, got {value!r}")
