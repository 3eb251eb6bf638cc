"""The process a run happens in: caches, threads, memory, log, versions, seeds, Hub settings.

The only reader of the environment.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import getpass
import hashlib
import importlib.metadata
import logging
import os
import platform
import shutil
import stat
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synthcube.escapes import visible
from synthcube.terminal import LogHandler, clear

if TYPE_CHECKING:
    import torch

log = logging.getLogger("synthcube")

_CACHES = (
    "SYNTHCUBE_CACHE", "XDG_CACHE_HOME", "HF_HOME", "TORCH_HOME", "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR", "MPLCONFIGDIR", "NUMBA_CACHE_DIR",
)  # fmt: skip
"""Variables with the folders of caches; libraries run code that they find in some of them."""


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """The folder for caches: SYNTHCUBE_CACHE, the user's cache folder, or a temporary one."""
    return private(_chosen(environment))


def keep_caches_private(environment: MutableMapping[str, str] = os.environ) -> None:
    """Move caches away from folders that other users may have prepared.

    To be called before the libraries are imported.
    """
    for name in _CACHES:
        if path := environment.get(name):
            environment[name] = str(private(Path(path)))


def private(path: Path) -> Path:
    """`path`; or a new folder, removed at exit, if another user may have prepared `path`.

    Below a folder that everyone may write to, such as /tmp, the first folder must belong to this
    user, be no link, and not be writable for others; a missing one is created so. A mount is
    trusted: whoever runs the container put it there.
    """
    for folder in reversed([path.absolute(), *path.absolute().parents[:-1]]):
        if _is_open(folder.parent) and not _is_own(folder):
            fresh = _fresh() / path.name
            log.warning("%s may be someone else's: %s is used until the end.", path, fresh)
            return fresh
    return path


def _chosen(environment: Mapping[str, str]) -> Path:
    if chosen := environment.get("SYNTHCUBE_CACHE"):
        return Path(chosen)
    if base := environment.get("XDG_CACHE_HOME"):
        return Path(base) / "synthcube"
    home = environment.get("HOME", "")
    if home and os.access(home, os.W_OK):
        return Path(home) / ".cache" / "synthcube"
    return Path(tempfile.gettempdir()) / f"synthcube-{os.geteuid()}"


def _is_open(folder: Path) -> bool:
    try:
        return bool(folder.stat().st_mode & stat.S_IWOTH)
    except OSError:  # it does not exist yet, and the folder above decides who creates it
        return False


def _is_own(folder: Path) -> bool:
    """Whether only this user can write to the folder, which is created if it is missing."""
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        pass
    except OSError:  # nothing can be written here: the code that needs a cache reports it
        return True
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        return False
    # root's own shared folder, such as /var/tmp: the folders below it are checked in turn
    is_shared_by_root = status.st_uid == 0 and bool(status.st_mode & stat.S_ISVTX)
    if folder.is_mount() or is_shared_by_root:
        return True
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@cache
def _fresh() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="synthcube-"))
    process = os.getpid()

    def remove() -> None:
        if os.getpid() == process:  # not at the end of a worker
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


PUBLIC_HUB = "https://huggingface.co"
_TRUE = ("1", "ON", "YES", "TRUE")


def ready_hub(environment: MutableMapping[str, str] = os.environ) -> str:
    """The address of the Hub: HF_ENDPOINT or the public one; sets the client's variables, too.

    To be called before huggingface_hub is imported. Only the public Hub has the storage service
    Xet, without which the client's uploads would fail: elsewhere it is switched off.
    """
    endpoint = environment.get("HF_ENDPOINT", "").rstrip("/") or PUBLIC_HUB
    if endpoint != PUBLIC_HUB:
        environment.setdefault("HF_HUB_DISABLE_XET", "1")
    environment.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not is_terminal():
        environment.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return endpoint


def uses_xet(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether files are transferred by the Hub's storage service Xet: see :func:`ready_hub`."""
    return environment.get("HF_HUB_DISABLE_XET", "").upper() not in _TRUE


def is_offline() -> bool:
    """Whether the user forbids all requests to a Hub: HF_HUB_OFFLINE=1."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in _TRUE


_LIGHTNING_CHATTER = (
    r"Found \d+ module\(s\) in eval mode",  # a first stage stays as it is
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r"The '.*_dataloader' does not have many workers",
    r"The number of training batches .* is smaller than the logging interval",
    r"It is recommended to use .self.log",  # LogMeans has added them up over processes
    r"You're resuming from a checkpoint that ended before the epoch ended",  # batches.start
    r"Checkpoint directory .* exists and is not empty",
    r"GPU available but not used",
    r"The dirpath has changed from",
    r"The `srun` command is available on your system",
    r"The \.grad attribute of a Tensor that is not a leaf Tensor",  # torch.compile looks at inputs
)


def calm_threads() -> None:
    """Let waiting threads sleep; to be called before torch is imported.

    GNU OpenMP's threads spin while they wait. On a machine that is busy with something else this
    made sampling nine times slower; see docs/benchmarks.md.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


_OBJECTS_OF_LIBRARIES = 1_000_000
"""PyTorch, Lightning and MONAI make 0.9 million objects that stay until the end."""


def delay_garbage_collection() -> None:
    """Let Python's first search for garbage wait until the libraries are imported.

    It would walk their objects over and over, which is an eighth of the CPU time of a start.
    Afterwards garbage is collected as usual.
    """
    usual = gc.get_threshold()
    if usual[0] == _OBJECTS_OF_LIBRARIES:
        return

    def restore(phase: str, _: Mapping[str, int]) -> None:
        if phase == "stop":
            gc.callbacks.remove(restore)
            gc.set_threshold(*usual)

    gc.callbacks.append(restore)
    gc.set_threshold(_OBJECTS_OF_LIBRARIES, *usual[1:])


def has_chosen_threads() -> bool:
    """Whether the user, or a launcher, has set the number of threads."""
    return "OMP_NUM_THREADS" in os.environ


def fix_cublas() -> None:
    """Make cuBLAS reproducible; to be called before its first matrix product."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def name_user() -> None:
    """Set a user name if there is none; to be called before MONAI is imported, which needs one.

    A container may run under any user number, even one that is missing in /etc/passwd.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):  # OSError since Python 3.13
        os.environ["USER"] = "synthcube"


def keep_out_current_folder() -> None:
    """Keep child processes from importing modules from the current folder (Python 3.11+)."""
    os.environ.setdefault("PYTHONSAFEPATH", "1")


def keep_loggers_local() -> None:
    """Switch off the telemetry of MLflow and W&B, and let MLflow write to a folder.

    To be called before they are imported.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    # Newer MLflow prefers a database, which does not work on the file systems of clusters.
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    os.environ.setdefault("WANDB_CACHE_DIR", str(cache_folder() / "wandb"))


def keep_conversions_local() -> None:
    """Switch off the telemetry of ONNX Runtime and OpenVINO; to be called before their import."""
    # With less, ONNX Runtime 1.31 still reports that it was started, and keeps a number of the
    # machine in the home folder.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    # OpenVINO's converter and NNCF do without this package where it cannot be imported.
    for name in ("openvino_telemetry", "openvino_telemetry.backend"):
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def import_monai() -> None:
    """Import MONAI without the MLflow that one of its handlers would import.

    That would take seconds at every start, and report the import to MLflow's maker.
    """
    if "monai" in sys.modules or "mlflow" in sys.modules:
        return
    sys.modules["mlflow"] = None  # type: ignore[assignment]  # Python's way to say: not there
    try:
        import monai  # noqa: F401
    finally:
        del sys.modules["mlflow"]


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Within this context Lightning's advertisements and needless advice are not shown."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for message in _LIGHTNING_CHATTER:
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# Of a container the files of its own group are at the top; version 2, then 1.
_CGROUP_FILES = (
    ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current"),
    ("sys/fs/cgroup/memory/memory.limit_in_bytes", "sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


# Microseconds of processor time in each period; version 2 has both in one file.
_QUOTA_FILES = (
    ("sys/fs/cgroup/cpu.max",),
    ("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "sys/fs/cgroup/cpu/cpu.cfs_period_us"),
)


def num_cores(root: Path = Path("/")) -> int:
    """The number of processor cores that this process may use.

    The least of its affinity and of the quota of the container or job (cgroup), rounded up.
    """
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    for names in _QUOTA_FILES:
        with contextlib.suppress(OSError, ValueError):  # "max" and -1 are no limit
            words = " ".join((root / name).read_text() for name in names).split()
            quota, period = int(words[0]), int(words[1])
            if quota > 0 and period > 0:
                cores = min(cores, -(-quota // period))
    return cores


def resident_bytes() -> int:
    """Bytes of RAM that this process occupies; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def free_memory(root: Path = Path("/")) -> int:
    """Bytes of the host's memory that this process may still take.

    The least of what the machine has free, what the limit of the container or job (cgroup) leaves,
    and what the limit of the address space leaves.
    """
    free = [sys.maxsize]
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = (root / "proc/meminfo").read_text().splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable:"))
        free.append(int(available.split()[1]) * 1024)
    for limit, used in _CGROUP_FILES:
        with contextlib.suppress(OSError, ValueError):  # "max" is no limit
            taken = int((root / used).read_text())
            free.append(max(0, int((root / limit).read_text()) - taken))
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        limit_bytes = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit_bytes != resource.RLIM_INFINITY:
            pages = int((root / "proc/self/statm").read_text().split()[0])
            free.append(max(0, limit_bytes - pages * resource.getpagesize()))
    return min(free)


def workers_that_fit(
    num_workers: int, batch_bytes: int, shared_memory: Path = Path("/dev/shm")
) -> int:
    """The number of data workers, at most `num_workers`, for which shared memory has room.

    Every worker keeps two batches there and the training holds a third; a container has 64 MB
    unless told otherwise. Another sharing strategy of PyTorch would not help: each of them takes
    the same memory. The batches are the same with any number of workers.
    """
    if not num_workers or not shared_memory.is_dir():
        return num_workers
    free = shutil.disk_usage(shared_memory).free
    fitting = min(num_workers, max(0, free // batch_bytes - 1) // 2)
    if fitting < num_workers:
        log.info(
            "Loading data with %d instead of %d workers: %s has %.1f MB free, they need %.1f MB. "
            "Give the container more with --shm-size.",
            fitting, num_workers, shared_memory, free / 1e6,
            (2 * num_workers + 1) * batch_bytes / 1e6,
        )  # fmt: skip
    return fitting


def is_terminal() -> bool:
    """Whether standard error is a terminal, where progress bars are shown instead of lines."""
    return sys.stderr.isatty()


class _Visible(logging.Formatter):
    """A log formatter that escapes control characters in names of others."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def open_log(*, debug: bool = False) -> None:
    """Send the package's log to standard error."""
    handler = LogHandler(sys.stderr)
    handler.setFormatter(_Visible("%(message)s"))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.DEBUG if debug else logging.INFO)


@contextmanager
def show_log() -> Iterator[None]:
    """Send the package's log to standard error, unless this program has its own logging.

    A bar that is on the screen goes at the end, also after an error.
    """
    if not log.hasHandlers():
        open_log()
    try:
        yield
    finally:
        clear()


def process_rank(num_devices: int = 1, environment: Mapping[str, str] = os.environ) -> int:
    """The rank of this process among all that train together, `num_devices` on each node."""
    if (rank := _first_number(environment, "RANK", "SLURM_PROCID")) is not None:
        return rank
    # Without a launcher, where the user starts the same command on each node.
    node, local = (environment.get(name, "0") for name in ("NODE_RANK", "LOCAL_RANK"))
    return int(node) * num_devices + int(local) if (node + local).isdecimal() else 0


def local_rank() -> int:
    """The rank of this process on its node, as the launcher set it."""
    return _first_number(os.environ, "LOCAL_RANK", "SLURM_LOCALID") or 0


def launched_processes() -> int:
    """The number of processes that a launcher (torchrun, srun) started, this one included."""
    number = _first_number(os.environ, "WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
    return 1 if number is None else number


def _first_number(environment: Mapping[str, str], *names: str) -> int | None:
    texts = (environment.get(name, "") for name in names)
    return next((int(text) for text in texts if text.isdecimal()), None)


RECORDED_PACKAGES = (
    "synthcube", "torch", "lightning", "monai", "monai-generative", "torchio", "SimpleITK",
    "nibabel", "diffusers", "numpy", "pydantic", "safetensors",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide what a run computes."""
    installed = {"python": platform.python_version()}
    for name in RECORDED_PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def environment_record(on: torch.device, precision_name: str) -> dict[str, Any]:
    """The content of `environment.json`, which tells why two runs differ."""
    import torch

    cpu_name = torch.cpu.get_capabilities().get("cpu_name") or platform.processor()
    name = torch.cuda.get_device_name(on) if on.type == "cuda" else str(cpu_name)
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "device": on.type,
        "device_name": name,
        "threads": torch.get_num_threads(),
        "precision": precision_name,
        "command": sys.argv,
    }


def derived_seed(*parts: int | str) -> int:
    """A seed in [0, 2**63) that depends on every part, the same on every machine."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


FLOWER_SOCKET = "SYNTHCUBEFLOWER_SOCKET"


def of_flower(scratch: Path) -> dict[str, str]:
    """The environment of Flower's processes: its commands are found, and it does not phone home.

    Args:
        scratch: private folder, in place of the user's own folder of Flower.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FLWR_")}
    return {
        **kept, "FLWR_HOME": str(scratch), "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "PYTHONSAFEPATH": "1", FLOWER_SOCKET: str(scratch / "socket"),
    }  # fmt: skip


def flower_socket() -> str:
    """Where the process that has started Flower listens to its apps."""
    return os.environ[FLOWER_SOCKET]


_GUARDED = "SYNTHCUBENVFLARE_GUARDED"


def mark_guarded() -> None:
    """Tell the processes that this one starts that it runs no job of NVFLARE but ours."""
    os.environ[_GUARDED] = "1"


def is_guarded() -> bool:
    """Whether the process that has started this one is guarded: see :func:`mark_guarded`."""
    return os.environ.get(_GUARDED) == "1"
