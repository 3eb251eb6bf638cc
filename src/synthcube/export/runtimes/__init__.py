"""Other runtimes than torch for a model's networks: ONNX Runtime and OpenVINO.

The networks are converted, one by one, and the samplers stay what they are, in Python: a model
that computes with a runtime is the same model, whose networks are called elsewhere.
"""

from __future__ import annotations

from synthcube.export.runtimes.conversion import check_request, convert
from synthcube.export.runtimes.formats import Converted, Runtime, Weights, is_part
from synthcube.export.runtimes.substitution import converted, substitute

__all__ = [
    "Converted", "Runtime", "Weights", "check_request", "convert", "converted", "is_part", "substitute",
]  # fmt: skip
