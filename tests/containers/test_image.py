"""What is in the image, and what is not."""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path

import pytest

from synthcube import __version__

HOW_TO = Path(__file__).parents[2] / "docs" / "how-to"

LOOK = """
import importlib.util, json, os, pathlib, shutil
app = pathlib.Path("/app")
libraries = pathlib.Path(importlib.util.find_spec("torch").origin).parents[1]
# licences lie in folders of such names as well
files = [path for path in app.rglob("*") if ".dist-info" not in str(path) and path.is_file()]
sources = [path for path in files if path.suffix == ".py"]
uncompiled = [str(path) for path in sources
              if not pathlib.Path(importlib.util.cache_from_source(path)).is_file()]
unreadable = [str(path) for path in app.rglob("*") if not os.access(path, os.R_OK)]
print(json.dumps({
    "unreadable": unreadable,
    "build tools": [name for name in ("gcc", "cc", "make", "git") if shutil.which(name)],
    "pip": importlib.util.find_spec("pip") is not None,
    "compiled": len(list((app / "lib").rglob("synthcube/models/__pycache__/family.*.pyc"))),
    "source": importlib.util.find_spec("synthcube").origin,
    "outside tmp": {name: value for name, value in os.environ.items()
                    if name.endswith(("HOME", "CACHE", "DIR")) and not value.startswith("/tmp")},
    "of tests": sorted({str(path.parent.relative_to(libraries)) for path in files
                        if {"test", "tests"} & set(path.parts)}),
    "of builds": [str(path) for path in files if path.suffix == ".a"
                  or path.is_relative_to(libraries / "torch" / "include")],
    "for devices": [path.name for path in files if "_gpu_plugin" in path.name],
    "uncompiled": uncompiled if len(uncompiled) > len(sources) / 1000 else [],
    "leftovers": [name for name in ("/build", "/tools") if os.path.exists(name)],
}))
"""


def test_only_what_is_needed_and_all_of_it_readable(docker) -> None:
    done = docker(["-c", LOOK], {}, user=12345, by=("/app/bin/python", "-I"))
    assert done.returncode == 0, done.stderr
    described = json.loads(done.stdout)
    assert described.pop("source").startswith("/app/lib/")
    assert described.pop("compiled") == 1
    assert described == {
        "unreadable": [], "build tools": [], "pip": False, "outside tmp": {}, "of tests": [],
        "of builds": [], "for devices": [], "uncompiled": [], "leftovers": [],
    }  # fmt: skip


def test_labels_user_entrypoint_and_size(tool: str, image: str) -> None:
    shown = subprocess.run([tool, "image", "inspect", image], capture_output=True, text=True)
    facts = json.loads(shown.stdout)[0]
    labels = facts["Config"]["Labels"]
    assert labels["org.opencontainers.image.version"] == __version__
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert facts["Config"]["Entrypoint"] == ["/app/bin/synthcube"]
    user = facts["Config"]["User"].split(":")[0]
    assert user.isdigit()
    assert int(user) > 0
    assert facts["Size"] <= 2_000_000_000


def test_the_size_on_the_page_is_that_of_the_image(tool: str, image: str) -> None:
    shown = subprocess.run(
        [tool, "image", "inspect", "--format", "{{.Size}}", image], capture_output=True, text=True
    )
    page = (HOW_TO / "docker.md").read_text(encoding="utf-8")
    (told,) = re.findall(r"^make image .*: about (\d\.\d) GB$", page, re.MULTILINE)
    assert abs(float(told) - int(shown.stdout) / 1e9) <= 0.1


def test_help_comes_at_once(docker) -> None:
    def seconds() -> float:
        start = time.perf_counter()
        assert docker(["--help"], {}).returncode == 0
        return time.perf_counter() - start

    assert min(seconds() for _ in range(4)) <= 1.5


@pytest.mark.slow
def test_the_image_checks_itself(docker) -> None:
    done = docker(["self-check"], {}, flags=("--rm", "--network=none"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"with openvino: \d", done.stdout), done.stdout
