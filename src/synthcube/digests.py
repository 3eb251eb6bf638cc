"""A digest of weights that does not depend on the file they are in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch

PREFIX = "tensors:"
"""So that it is not taken for the hash of a file."""


def weights_digest(weights: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names, types, shapes and values, in the order of the names; after PREFIX."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        head = json.dumps([name, str(tensor.dtype), list(tensor.shape)])
        digest.update(head.encode() + b"\n")
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return PREFIX + digest.hexdigest()
