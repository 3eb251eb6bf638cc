"""Keys and certificates in the form that Flower reads: elliptic curves of NIST, as OpenSSH text."""

from __future__ import annotations

import os
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from synthcube import reading
from synthcube.errors import FederationError
from synthcube.federation.identity import KEY

_CURVES = (ec.SECP224R1, ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)


def public_key(certificate: bytes, label: str) -> ec.EllipticCurvePublicKey:
    """The key in the certificate of a site, in DER form. Raises FederationError."""
    key = x509.load_der_x509_certificate(certificate).public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, _CURVES):
        raise FederationError(
            f"{label}: Flower needs a certificate with an elliptic curve of NIST, such as P-384; "
            "this one has another kind of key."
        )
    return key


def as_openssh(key: ec.EllipticCurvePublicKey) -> bytes:
    """A public key as `flwr supernode register` reads it."""
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)


def as_flower_tells(key: ec.EllipticCurvePublicKey) -> str:
    """A public key as Flower tells it of a node."""
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    ).decode()


def write_private_key(certificates: Path, path: Path) -> None:
    """Write the key of a site as Flower reads it, for nobody else to read.

    Raises FederationError if it is no key that Flower takes.
    """
    content = reading.read_bytes(certificates / KEY, FederationError)
    try:
        key = serialization.load_pem_private_key(content, password=None)
    except (ValueError, TypeError) as error:
        raise FederationError(
            f"--certificates {certificates}: {KEY} is no PEM file, or has a password."
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, _CURVES):
        raise FederationError(
            f"--certificates {certificates}: Flower needs a key of an elliptic curve of NIST, such "
            f"as P-384; {KEY} is of another kind."
        )
    text = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )  # fmt: skip
    number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(number, "wb") as file:
        file.write(text)
