"""The bundle that Flower sends to sites: one constant file, so that a site knows its hash.

All code is in the installed package. A bundle with any other content is refused by the sites, as
Flower would run whatever it holds.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path

from synthcube import __version__, storage

# As flwr.cli.build writes it again, byte for byte.
PYPROJECT = f"""\
[project]
name = "synthcube-federation"
version = "{__version__}"
description = ""
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "synthcube"

[tool.flwr.app.components]
serverapp = "synthcube.federation_flower.apps:server"
clientapp = "synthcube.federation_flower.apps:client"

[tool.flwr.app.config]
"""
_DATE = (2024, 10, 1, 0, 0, 0)  # of every file in a bundle


def write_app(folder: Path) -> Path:
    """Write the folder that `flwr run` bundles; returns it."""
    app = storage.make_folder(folder / "synthcube-federation")
    storage.write_text(app / "pyproject.toml", PYPROJECT)
    return app


def bundle() -> bytes:
    """The bundle as flwr 1.42 makes it out of that folder: a ZIP file without compression."""
    content = PYPROJECT.encode()
    # The sizes are in bits.
    listed = f"pyproject.toml,{hashlib.sha256(content).hexdigest()},{8 * len(content)}"
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, text in (("pyproject.toml", content), (".info/CONTENT", listed.encode())):
            archive.writestr(zipfile.ZipInfo(name, _DATE), text)
    return file.getvalue()


def is_ours(content: bytes) -> bool:
    """Whether a bundle is the one of this version of SynthCube."""
    return content == bundle()
