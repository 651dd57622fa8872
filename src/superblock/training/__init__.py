"""Training and evaluation: a configuration in, a model and its figures out."""

from superblock.training.assess import assess
from superblock.training.config import (
    AverageConfig,
    DataConfig,
    EvalConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)
from superblock.training.evaluation import Metrics, evaluate
from superblock.training.fit import TrainResult, fit

__all__ = [
    "AverageConfig",
    "DataConfig",
    "EvalConfig",
    "Metrics",
    "OptimizerConfig",
    "ScheduleConfig",
    "TrainConfig",
    "TrainResult",
    "assess",
    "evaluate",
    "fit",
]
