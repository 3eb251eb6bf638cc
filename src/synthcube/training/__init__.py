"""Training: the Lightning Trainer, put together from the config."""

from synthcube.training.config import EMAConfig, TrainingConfig
from synthcube.training.fit import Plan, fit

__all__ = ["EMAConfig", "Plan", "TrainingConfig", "fit"]
