"""Training together: what sites agree on, what they send, and how it is averaged. No network."""

from typing import Literal

EngineName = Literal["https", "flower", "nvflare"]
"""What carries the messages of a federation: our own connection, Flower, or NVIDIA FLARE."""
