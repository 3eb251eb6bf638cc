"""Train, sample, judge and share generative models of medical images."""

__version__ = "0.1.0"
