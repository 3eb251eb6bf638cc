"""What is in the image, and what is not."""

from __future__ import annotations

import json
import subprocess
import time

from synthcube import __version__

LOOK = """
import importlib.util, json, os, pathlib, shutil
app = pathlib.Path("/app")
unreadable = [str(path) for path in app.rglob("*") if not os.access(path, os.R_OK)]
print(json.dumps({
    "unreadable": unreadable,
    "build tools": [name for name in ("gcc", "cc", "make", "git") if shutil.which(name)],
    "pip": importlib.util.find_spec("pip") is not None,
    "compiled": len(list((app / "lib").rglob("synthcube/__pycache__/family.*.pyc"))),
    "source": importlib.util.find_spec("synthcube").origin,
    "outside tmp": {name: value for name, value in os.environ.items()
                    if name.endswith(("HOME", "CACHE", "DIR")) and not value.startswith("/tmp")},
    "leftovers": [name for name in ("/build", "/tools") if os.path.exists(name)],
}))
"""


def test_only_what_is_needed_and_all_of_it_readable(docker) -> None:
    done = docker(["-c", LOOK], {}, user=12345, by=("/app/bin/python", "-I"))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("source").startswith("/app/lib/")
    assert found.pop("compiled") == 1
    assert found == {
        "unreadable": [], "build tools": [], "pip": False, "outside tmp": {}, "leftovers": [],
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


def test_help_comes_at_once(docker) -> None:
    def seconds() -> float:
        start = time.perf_counter()
        assert docker(["--help"], {}).returncode == 0
        return time.perf_counter() - start

    assert min(seconds() for _ in range(4)) <= 1.5


def test_the_image_checks_itself(docker) -> None:
    done = docker(["self-check"], {}, flags=("--rm", "--network=none"))
    assert done.returncode == 0, done.stdout + done.stderr
