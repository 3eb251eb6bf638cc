"""Certificates of a study, made with openssl as docs/federation.md tells."""

from __future__ import annotations

import base64
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path


class Authority:
    """Signs certificates; each owner gets a folder with crt.crt, key.key and root.crt."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._key, self.root = folder, folder / "root.key", folder / "root.crt"
        _openssl(
            "req", "-x509", *_new_key(self._key), "-subj", "/CN=authority", "-days", "2",
            "-addext", "keyUsage=critical,keyCertSign", "-out", self.root,
        )  # fmt: skip

    def issue(self, name: str, host: str = "127.0.0.1") -> Path:
        """The folder of a new owner."""
        folder = self.folder / name
        folder.mkdir()
        request = folder / "request"
        _openssl("req", "-new", *_new_key(folder / "key.key"), "-subj", f"/CN={name}",
                 "-addext", f"subjectAltName=IP:{host}", "-out", request)  # fmt: skip
        _openssl("x509", "-req", "-in", request, "-CA", self.root, "-CAkey", self._key,
                 "-CAcreateserial", "-days", "2", "-copy_extensions", "copy", "-out",
                 folder / "crt.crt")  # fmt: skip
        request.unlink()
        shutil.copy(self.root, folder)
        return folder


def site_list(path: Path, folders: Sequence[Path], labels: Sequence[str]) -> Path:
    """A list of sites as MedPerf writes it, with the certificates in these folders."""
    lines = [
        f"{label}: {{email: {label}@example.org, certificate: {encoded(folder)}}}"
        for folder, label in zip(folders, labels, strict=True)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def encoded(folder: Path) -> str:
    """The certificate in a folder, in base64."""
    return base64.b64encode((folder / "crt.crt").read_bytes()).decode()


def _new_key(path: Path) -> list[object]:
    return ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", path]


def _openssl(*words: object) -> None:
    subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True)
