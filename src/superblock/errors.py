"""Errors a user can act on: one line each, saying what was expected, what came and what to do."""


class SuperBlockError(Exception):
    """Base of every error SuperBlock raises on purpose."""


class ConfigError(SuperBlockError, ValueError):
    """An option, or a combination of options, that cannot be meant."""


class MatrixError(SuperBlockError, ValueError):
    """Tensors that do not form a block-sparse matrix, or do not fit one another."""


class ModelError(SuperBlockError, ValueError):
    """A model that cannot take what was asked of it."""


class CheckpointError(SuperBlockError, RuntimeError):
    """A file that cannot be read, written or matched to a model."""


class DataError(SuperBlockError, RuntimeError):
    """A data set that is missing, empty or does not fit the model."""


class BackendError(SuperBlockError, RuntimeError):
    """A device or backend that is absent or cannot do what was asked."""


class TrainingError(SuperBlockError, RuntimeError):
    """Training that cannot go on."""
