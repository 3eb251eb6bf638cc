"""The examples for Slurm, submitted to a cluster of this one machine that lives for the tests."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from synthcube.data.phantom import write_phantoms

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "slurm"
DAEMONS = ("munged", "slurmctld", "slurmd")
SETTINGS = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2
MpiDefault=none
ReturnToService=2
KillWait=2
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=32 RealMemory=200000
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture(scope="module")
def slurm(need: Callable[..., None]) -> Iterator[dict[str, str]]:
    """A cluster of one node; yields the environment in which its commands work."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    is_there = all(shutil.which(name, path=path) for name in (*DAEMONS, "sbatch"))
    need("slurm", is_there and os.getuid() == 0, "Slurm is not here, or we are not root")
    folder = Path(tempfile.mkdtemp(prefix="synthcube-slurm-"))
    folder.chmod(0o755)  # munge wants to be reached by everybody
    environment = {**os.environ, "PATH": path, "SLURM_CONF": str(folder / "slurm.conf")}
    try:
        _start(folder, environment)
        yield environment
    finally:
        for name in reversed(DAEMONS):
            _end(folder / f"{name}.pid")
        shutil.rmtree(folder, ignore_errors=True)


def _start(folder: Path, environment: dict[str, str]) -> None:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    ports = [bound.getsockname()[1] for bound in sockets]
    for bound in sockets:
        bound.close()
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "slurm.conf").write_text(
        SETTINGS.format(
            host=socket.gethostname().split(".")[0],
            folder=folder,
            ports=ports,
        )
    )
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o600)
    files = ("socket", "pid", "log")
    munge = {"socket": "munge.socket", "pid": "munged.pid", "log": "munged.log"}
    for command in (
        ["munged", "--force", f"--key-file={folder}/key", f"--seed-file={folder}/seed",
         *(f"--{name}{'' if name == 'socket' else '-file'}={folder}/{munge[name]}"
           for name in files)],
        ["slurmctld", "-c", "-f", str(folder / "slurm.conf")],
        ["slurmd", "-c", "-f", str(folder / "slurm.conf")],
    ):  # fmt: skip
        # in files: a daemon would keep a pipe open
        with (folder / f"{command[0]}.out").open("w") as out:
            code = subprocess.run(command, env=environment, stdout=out, stderr=out).returncode
        assert code == 0, _logs(folder)
    end = time.monotonic() + 60
    while "idle" not in _said(["sinfo", "--noheader", "--format=%T"], environment):
        assert time.monotonic() < end, _logs(folder)
        time.sleep(0.5)


def _logs(folder: Path) -> str:
    logs = (*folder.glob("*.out"), *folder.glob("*.log"))
    return "\n".join(f"{path.name}:\n{path.read_text()[-2000:]}" for path in logs)


def _end(pid_file: Path) -> None:
    if not pid_file.exists():
        return
    pid = int(pid_file.read_text())
    try:
        os.kill(pid, signal.SIGTERM)
        for _ in range(100):
            os.kill(pid, 0)
            time.sleep(0.1)
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _said(command: list[str], environment: dict[str, str]) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True).stdout


class Job:
    """A submitted example."""

    def __init__(
        self, slurm: dict[str, str], folder: Path, words: Sequence[str], **places: object
    ) -> None:
        self.environment = {**slurm, **{name: str(value) for name, value in places.items()}}
        self.log = folder / "job.log"
        done = subprocess.run(
            ["sbatch", "--parsable", f"--output={self.log}", *words],
            cwd=folder, env=self.environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        self.number = done.stdout.strip()

    def state(self) -> str:
        said = _said(["scontrol", "show", "job", self.number], self.environment)
        return said.partition("JobState=")[2].split(" ")[0]

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait_for(self, condition: Callable[[], bool], seconds: float = 240) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert self.state() not in ("FAILED", "CANCELLED", "TIMEOUT"), self.said()
            assert time.monotonic() < end, f"{self.state()}\n{self.said()}"
            time.sleep(0.2)

    def finish(self) -> None:
        self.wait_for(lambda: self.state() == "COMPLETED")


def _without_gpus(script: str, tasks: int) -> list[str]:
    return ["--gres=none", "--nodes=1", f"--ntasks-per-node={tasks}", str(EXAMPLES / script)]


def test_the_command_of_the_page_runs_on_a_node_without_gpus(
    slurm, sif: Path, inputs: Path, tmp_path: Path
) -> None:
    """As it stands, in a folder as the page wants it, on a cluster that has no GPU to give."""
    page = (ROOT / "docs" / "how-to" / "slurm.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^sbatch (.*--gres=none.*)$", page, re.MULTILINE)
    (tmp_path / "synthcube.sif").symlink_to(sif)
    (tmp_path / "workspace").symlink_to(inputs)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    words = shlex.split(line)
    asking = [word for word in words if word != "--gres=none"]
    refused = subprocess.run(["sbatch", *asking], cwd=tmp_path, env=slurm, capture_output=True)
    assert refused.returncode, "this cluster has GPUs"
    Job(slurm, tmp_path, words).finish()
    assert len(list((tmp_path / "outputs" / "images" / "images").iterdir())) > 0


@pytest.mark.parametrize("script", ["one_node.sbatch", "several_nodes.sbatch"])
def test_tasks_of_a_job_share_one_training(
    script: str, slurm, sif: Path, inputs: Path, tmp_path: Path
) -> None:
    """Two tasks; Slurm makes the processes, and they find each other by its variables."""
    out = tmp_path / "outputs"
    places = {"SIF": sif, "INPUTS": inputs, "OUTPUTS": out, "MASTER_ADDR": "127.0.0.1"}
    job = Job(slurm, tmp_path, _without_gpus(script, 2), **places)
    job.finish()
    assert (out / "run" / "artifact" / "weights.safetensors").is_file()
    assert job.said().count("epoch 2/2") == 1, job.said()
    assert job.said().count("Trained model") == 1, job.said()


@pytest.mark.parametrize(
    ("script", "tasks"),
    [("one_gpu.sbatch", 1), pytest.param("one_node.sbatch", 2, marks=pytest.mark.slow)],
    ids=["one", "two tasks"],
)
def test_the_signal_saves_and_sends_the_job_back_and_it_continues(
    script: str, tasks: int, slurm, sif: Path, inputs: Path, tmp_path: Path
) -> None:
    """Within an epoch of many steps, which only a checkpoint within it can continue."""
    text = (inputs / "config.yaml").read_text().replace("max_epochs: 2", "max_epochs: 3")
    longer = tmp_path / "longer"
    longer.mkdir()
    (longer / "config.yaml").write_text(
        text.replace("n_epochs: 1", "n_epochs: 0").replace(
            "batch_size: 4", "batch_size: 2\n  log_every_n_steps: 1"
        )
    )
    write_phantoms(longer / "data", num=500, size=(16, 16))
    out = tmp_path / "outputs"
    places = {"SIF": sif, "INPUTS": longer, "OUTPUTS": out, "MASTER_ADDR": "127.0.0.1"}
    job = Job(slurm, tmp_path, _without_gpus(script, tasks), **places)
    job.wait_for(lambda: "step 20 " in job.said())
    subprocess.run(
        ["scancel", "--signal=USR1", "--batch", job.number], env=job.environment, check=True
    )
    told = time.monotonic()
    job.wait_for(lambda: "back into the queue, after code 75" in job.said())
    assert time.monotonic() - told < 20
    assert "stopped: SIGUSR1 came in epoch 1, after step" in job.said()
    job.finish()
    assert "Continuing in epoch 1, after step" in job.said()
    assert (out / "run" / "artifact" / "weights.safetensors").is_file()
