"""Secure aggregation: the coordinator gets the sum of all sites' weights, and no site's own.

Any two sites have a secret that the coordinator, which hands on their public keys (X25519), does
not know. From it both draw the same numbers in each round; one adds them to its weights, the other
subtracts them. Weights travel as whole numbers of 64 bits (fixed point), so the masks cancel in the
sum to the bit, whatever they were.

The masks are those of Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine
Learning" (CCS 2017), section 4, without its shares of keys: a round needs all sites.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from synthcube import reading, storage
from synthcube.errors import FederationError, first_faults
from synthcube.federation.agreement import Agreement
from synthcube.federation.plan import FederationPlan
from synthcube.federation.update import Update

_FRACTION_BITS = 40  # steps of 1e-12: finer than float32 above 1e-5
_LARGEST = 2.0**22  # of a weight: the sum of shares of it stays below 2^63
_PIECE = 1 << 20  # numbers of a mask at once


class MaskKey:
    """The key of a site (X25519), in a file that its owner alone reads; made if it is missing."""

    def __init__(self, path: Path) -> None:
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

        if not path.exists():
            content = X25519PrivateKey.generate().private_bytes_raw().hex()
            storage.write_with(path, partial(Path.write_text, data=content), mode=0o600)
        try:
            content = reading.read_text(path, FederationError)
            self._key = X25519PrivateKey.from_private_bytes(bytes.fromhex(content))
        except ValueError as error:
            raise FederationError(f"{path} is damaged: it holds no key of 64 digits.") from error

    @property
    def public(self) -> str:
        """What others get: 64 hexadecimal digits."""
        return self._key.public_key().public_bytes_raw().hex()

    def mask_with(self, public: str, context: str) -> Iterator[Tensor]:
        """Numbers that the owner of another key draws too: int64, uniform, in pieces without end.

        Args:
            context: what they are for; no two sets of weights may have the same.

        Raises:
            FederationError: that is no key.
        """
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        try:
            secret = self._key.exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(public)))
        except ValueError as error:
            raise FederationError("The mask key of a site is no key.") from error
        derived = HKDF(SHA256(), 32, salt=None, info=context.encode()).derive(secret)
        stream = Cipher(algorithms.ChaCha20(derived, bytes(16)), mode=None).encryptor()
        while True:
            numbers = np.frombuffer(stream.update(bytes(8 * _PIECE)), dtype="<i8")
            yield torch.from_numpy(numbers.astype(np.int64))


def masked(update: Update, site: str, agreement: Agreement, key: MaskKey) -> Update:
    """An update of a site as the coordinator may see it: its share of the average, masked.

    Raises FederationError if a weight is too large, or a key of the agreement is none.
    """
    share = agreement.images[site] / sum(agreement.images.values())
    if large := [name for name, tensor in update.tensors.items() if _largest(tensor) >= _LARGEST]:
        raise FederationError(
            f"Not sent: secure aggregation takes weights below {_LARGEST:,.0f}.",
            first_faults(large),
        )
    context = f"{agreement.plan} {agreement.sha256} {update.header.round}"
    masks = [
        (1 if site < other else -1, _Stream(key.mask_with(public, context)))
        for other, public in sorted(agreement.mask_keys.items())
        if other != site
    ]
    tensors = {}
    for name in sorted(update.tensors):
        encoded = (update.tensors[name].double() * share * 2**_FRACTION_BITS).round().long()
        flat = encoded.flatten()
        for sign, stream in masks:
            flat += sign * stream.take(flat.numel())
        tensors[name] = flat.reshape(encoded.shape)
    return replace(update, tensors=tensors)


class _Stream:
    """Takes as many numbers as wanted from pieces of another size."""

    def __init__(self, pieces: Iterator[Tensor]) -> None:
        self._pieces, self._left = pieces, torch.empty(0, dtype=torch.int64)

    def take(self, number: int) -> Tensor:
        parts = [self._left]
        while sum(map(len, parts)) < number:
            parts.append(next(self._pieces))
        together = torch.cat(parts)
        self._left = together[number:]
        return together[:number]


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def summed(updates: Mapping[str, Update], shapes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The average of the weights of all sites, out of their masked updates.

    Args:
        shapes: names, shapes and types of the average.

    Raises:
        FederationError: the sum is no average: a site has masked for others than these.
    """
    average, wrong = {}, []
    for name in sorted(shapes):
        total = torch.zeros(shapes[name].shape, dtype=torch.int64)
        for update in updates.values():
            total += update.tensors[name]  # modulo 2^64, in any order
        decoded = total.double() / 2**_FRACTION_BITS
        if _largest(decoded) > _LARGEST:
            wrong.append(name)
        average[name] = decoded.to(shapes[name].dtype)
    if wrong:
        raise FederationError(
            "The masks of the sites do not cancel: one of them has sent something else than its "
            "masked weights.", first_faults(wrong),
        )  # fmt: skip
    return average


def shapes_sent(plan: FederationPlan, shapes: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Names, shapes and types of what a site sends, of those of the weights."""
    if not plan.secure_aggregation:
        return shapes
    return {
        name: torch.empty_like(blank, device="meta", dtype=torch.int64)
        for name, blank in shapes.items()
    }
