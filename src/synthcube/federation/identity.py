"""Who is who in a federation: certificates, mutual TLS, and the list of the sites' certificates.

A folder of certificates has the names that MedPerf gives them: crt.crt and key.key, the own
certificate and its key, and root.crt, the certificate of the authority that signs all of them.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import ssl
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from synthcube import reading
from synthcube.errors import FederationError
from synthcube.federation.plan import FederationPlan, SiteName
from synthcube.schema import Schema

CERTIFICATE, KEY, ROOT = "crt.crt", "key.key", "root.crt"
_PEM = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
_MAX_ADDRESS = 255


class SiteCertificate(Schema):
    """The entry of a site in the list that MedPerf calls cols.yaml."""

    email: str = Field(default="", description="Whom to ask about this site.")
    certificate: Annotated[str, Field(max_length=1 << 16)] = Field(
        description="Its certificate as PEM text, or that text in base64."
    )


_SITES: TypeAdapter[dict[str, SiteCertificate]] = TypeAdapter(dict[SiteName, SiteCertificate])


def site_certificates(path: Path, plan: FederationPlan) -> dict[str, bytes]:
    """The certificates of the sites in DER form, by label.

    Raises FederationError, with all faults of the file.
    """
    try:
        listed = _SITES.validate_python(reading.read_yaml(path, FederationError))
    except ValidationError as error:
        raise FederationError(
            f"--site_certificates {path} is not as it should be; write for each site "
            "LABEL: {email: NAME, certificate: PEM in base64}:",
            reading.faults_of(error),
        ) from error
    faults = [f"{label}: is not a site of the plan" for label in listed if label not in plan.sites]
    faults += [f"{label}: has no certificate" for label in plan.sites if label not in listed]
    labels: dict[bytes, str] = {}
    for label, entry in listed.items():
        certificate = _decoded(entry.certificate)
        if certificate is None:
            faults.append(f"{label}: its certificate is neither PEM text nor that in base64")
        elif certificate in labels:
            faults.append(f"{label}: has the certificate of {labels[certificate]}")
        else:
            labels[certificate] = label
    if faults:
        raise FederationError(f"--site_certificates {path} does not fit the plan:", faults)
    return {label: certificate for certificate, label in labels.items()}


def common_name_digest(name: str) -> str:
    """The SHA-256 of a common name, which stands for it where no people are named."""
    return hashlib.sha256(name.strip().lower().encode()).hexdigest()


def fingerprint(certificate: bytes) -> str:
    """The SHA-256 of a certificate in DER form."""
    return hashlib.sha256(certificate).hexdigest()


def _decoded(text: str) -> bytes | None:
    """The first certificate in PEM text, or in base64 of it, in DER form; None if none."""
    try:
        if "-----BEGIN" not in text:
            text = base64.b64decode("".join(text.split()), validate=True).decode("ascii")
        match = _PEM.search(text)
        return ssl.PEM_cert_to_DER_cert(match[0]) if match else None
    except (binascii.Error, ValueError):
        return None


def server_context(folder: Path, root: Path | None = None) -> ssl.SSLContext:
    """TLS of the coordinator: only those with a certificate of the authority may connect.

    Args:
        folder: with its certificate and key.
        root: folder with root.crt; None: the same folder.
    """
    return _context(ssl.PROTOCOL_TLS_SERVER, folder, root or folder)


def client_context(folder: Path, root: Path | None = None) -> ssl.SSLContext:
    """TLS of a site: the coordinator needs a certificate of the authority, for its address."""
    return _context(ssl.PROTOCOL_TLS_CLIENT, folder, root or folder)  # which checks the name


def _context(protocol: int, folder: Path, root: Path) -> ssl.SSLContext:
    paths = (folder / CERTIFICATE, folder / KEY, root / ROOT)
    if missing := [path.name for path in paths if not path.is_file()]:
        raise FederationError(
            f"--certificates {folder} needs {CERTIFICATE}, {KEY} and {ROOT}; missing: "
            f"{', '.join(missing)}."
        )
    for path in paths:
        reading.read_bytes(path, FederationError)  # readable, and no pipe
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        # A password is never asked for: nobody is there to type it.
        context.load_cert_chain(folder / CERTIFICATE, folder / KEY, password=lambda: "")
    except (ssl.SSLError, ValueError) as error:
        raise FederationError(
            f"--certificates {folder}: {KEY} is not the key of {CERTIFICATE}, or one of them is "
            f"no PEM file, or the key has a password ({_reason(error)})."
        ) from error
    try:
        context.load_verify_locations(root / ROOT)
    except (ssl.SSLError, ValueError) as error:
        raise FederationError(
            f"--certificates {folder}: {ROOT} holds no certificate as PEM ({_reason(error)})."
        ) from error
    return context


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", None) or type(error).__name__).lower().replace("_", " ")


def tls_fault(error: ssl.SSLError, host: str) -> str:
    """What a site is told of a connection without trust; empty if a later try may succeed."""
    reason = (error.reason or "").upper()
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"its certificate is not accepted: {error.verify_message.rstrip('.')}. It must be "
            f"signed by {ROOT} of this site, and made for {host}."
        )
    if "ALERT" in reason:
        return (
            f"it does not accept the certificate of this site ({_reason(error)}): {CERTIFICATE} "
            f"must be valid now, and signed by the authority that the coordinator has as {ROOT}."
        )
    if any(mark in reason for mark in ("WRONG_VERSION", "HTTP_REQUEST", "RECORD_LAYER")):
        return "it does not speak TLS: another server is at this address, or a proxy between."
    return "" if "EOF" in reason else f"the connection is not secure ({_reason(error)})."


def parsed_address(text: str, option: str = "--address") -> tuple[str, int]:
    """Host and port of HOST:PORT, or [IPV6]:PORT. Raises FederationError."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    is_plain = re.fullmatch(r"[A-Za-z0-9.:_-]+", host) and len(host) <= _MAX_ADDRESS
    if not (colon and is_plain and port.isdecimal() and int(port) < 1 << 16):
        raise FederationError(f"{option} {text}: write it as HOST:PORT, as in 10.0.0.5:50273.")
    return host, int(port)
