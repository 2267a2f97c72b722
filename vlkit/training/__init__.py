"""Training: models over many ranks, runs that resume, and what a run will cost."""

from vlkit.training.config import TrainConfig, read_train_config
from vlkit.training.faults import EXIT_STOPPED
from vlkit.training.loop import Result, train

__all__ = ["EXIT_STOPPED", "Result", "TrainConfig", "read_train_config", "train"]
