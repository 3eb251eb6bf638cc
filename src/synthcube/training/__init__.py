"""Training: the Lightning Trainer, put together from the config."""

from synthcube.training.config import EMAConfig, TrainingConfig
from synthcube.training.fit import TrainingRun, fit

__all__ = ["EMAConfig", "TrainingConfig", "TrainingRun", "fit"]
