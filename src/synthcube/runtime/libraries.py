"""What libraries are told before they start: in the environment, most of them at import."""

from __future__ import annotations

import getpass
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from synthcube.runtime.folders import cache_folder

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
    r"The `srun` command is available on your system but is not used",
    r"The `srun` command is available on your system",
    r"The \.grad attribute of a Tensor that is not a leaf Tensor",  # torch.compile looks at inputs
)


def calm_threads() -> None:
    """Let waiting threads sleep; to be called before torch is imported.

    GNU OpenMP's threads spin while they wait. On a machine that is busy with something else this
    made sampling nine times slower; see docs/benchmarks.md.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def fix_cublas() -> None:
    """Let cuBLAS compute the same bits every time; to be called before its first product."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def name_user() -> None:
    """Give a nameless user a name; to be called before MONAI is imported, which fails without.

    A container may run under any number, also one that its list of users does not have.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):  # OSError since Python 3.13
        os.environ["USER"] = "synthcube"


def keep_out_current_folder() -> None:
    """Let no file of the current folder take the place of a module in processes to come.

    Python 3.10 does not know of it.
    """
    os.environ.setdefault("PYTHONSAFEPATH", "1")


def keep_loggers_local() -> None:
    """Keep what MLflow and W&B would report to their makers on this machine, and let MLflow write
    to a folder; to be called before they are imported.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    # Newer MLflow would have a database, which does not work on the file systems of clusters.
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    os.environ.setdefault("WANDB_CACHE_DIR", str(cache_folder() / "wandb"))


def keep_conversions_local() -> None:
    """Keep what ONNX Runtime and OpenVINO would report to their makers on this machine; to be
    called before they are imported.
    """
    # With less, ONNX Runtime 1.31 still reports that it was started, and keeps a number of the
    # machine in the home folder.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    # OpenVINO's converter and NNCF do without this package where it cannot be imported.
    for name in ("openvino_telemetry", "openvino_telemetry.backend"):
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def import_monai() -> None:
    """Import MONAI for the first time, but not the MLflow that it would import for a handler.

    That takes seconds at every start, and reports the import to MLflow's maker.
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
    """Keep out what Lightning tells its developers: its advertisements, and what users know."""

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
