"""Training runs, and comparisons of training methods, on small image sets.

>>> from wus_ext.training import TrainConfig, train
>>> config = TrainConfig(
...     model="alexnet", dataset="digits", limit_train=20, limit_test=10, epochs=1, batch_size=10
... )
>>> history = train(config)
>>> sorted(history[0])[:3]
['epoch', 'eval_seconds', 'images_per_second']
"""

from .checkpoint import load_checkpoint
from .config import TrainConfig
from .data import Data, load_data
from .errors import (
    ConfigError,
    DataError,
    MissingExtra,
    RunWarning,
    StorageError,
    TrainingError,
)
from .lr_finder import LrCurve, find_lr
from .progress import Progress
from .splits import FileSplit, MemorySplit
from .trainer import Trainer, train

__all__ = [
    "ConfigError",
    "Data",
    "DataError",
    "FileSplit",
    "LrCurve",
    "MemorySplit",
    "MissingExtra",
    "Progress",
    "RunWarning",
    "StorageError",
    "TrainConfig",
    "Trainer",
    "TrainingError",
    "find_lr",
    "load_checkpoint",
    "load_data",
    "train",
]
