"""Train, sample, judge and share generative models of medical images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

# Nothing heavy at the top: that would import PyTorch for `synthcube --help`.
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from synthcube.generator import Generator

__version__ = "0.1.0"
__all__ = ["__version__", "evaluate", "from_pretrained", "infer", "train"]


def from_pretrained(
    model: str | Path,
    *,
    accelerator: str = "auto",
    runtime: str = "torch",
    plugins: Sequence[str | Path] = (),
    trust: Sequence[str] = (),
) -> Generator:
    """Open a trained model: a folder, or owner/name[@revision] of a Hub.

    Args:
        model: a run, an artifact or an exported folder, or the name of a model on a Hub.
        accelerator: auto, cpu or gpu.
        runtime: what computes its networks: torch; or onnx or openvino, on the CPU, for a model
            that was exported for it.
        plugins: folders whose code this model may run; see docs/how-to/own-code.md.
        trust: installed packages whose code it may run.

    Returns:
        An object with `sample(n)`, `sample("Hand", n=4)`, `translate(images)` and
        `reconstruct(images)`, whose images a notebook shows; see synthcube.generator.

    Raises:
        SynthCubeError: there is none, it cannot be had, or it is damaged.
    """
    from synthcube.generator import from_pretrained as opened

    return opened(model, accelerator=accelerator, runtime=runtime, plugins=plugins, trust=trust)


def train(
    config: str | Path | Mapping[str, Any],
    data: str | Path,
    output: str | Path,
    *,
    overrides: Sequence[str] = (),
    resume: str = "auto",
    accept_changes: bool = False,
    plugins: Sequence[str | Path] = (),
    trust: Sequence[str] = (),
) -> Path | None:
    """Train a model as `synthcube train` does; the same call again continues where it stopped.

    Args:
        config: the path of a YAML, or its content: {"model": {...}, "data": {...}, ...}.
        data: a folder or a CSV of images.
        output: the folder of the run.
        overrides: keys of the config, as in ["training.max_epochs=3"].
        resume: auto continues a run; never refuses one; or a checkpoint's path.
        accept_changes: continue a run although keys that matter have changed.
        plugins: folders whose code it may run; see docs/how-to/own-code.md.
        trust: installed packages whose code it may run.

    Returns:
        The folder of the trained model, which :func:`from_pretrained` opens, as it does `output`;
        None in all but the first of the processes that train together.

    Raises:
        PreemptedError: a signal, Ctrl-C among them, stopped it: the same call continues it.
        SynthCubeError: the config, the images or the folder cannot be used.
    """
    from pathlib import Path

    from synthcube.environment import show_log
    from synthcube.plugins import vouching
    from synthcube.tasks.train import train as task

    with show_log(), vouching(plugins, trust):
        return task(
            Path(config) if isinstance(config, str) else config, Path(data), Path(output),
            overrides=overrides, resume=resume, accept_changes=accept_changes,
        )  # fmt: skip


def infer(
    model: str | Path,
    output: str | Path,
    num_images: int | str | Mapping[str, int] | None = None,
    *,
    seed: int | None = None,
    data: str | Path | None = None,
    batch_size: int | None = None,
    guidance: float | None = None,
    sampler: str | None = None,
    steps: int | None = None,
    animate: Literal["steps", "slices"] | None = None,
    config: str | Path | Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    condition: Mapping[str, str | float] | None = None,
    conditions: str | Path | Sequence[Mapping[str, str]] | None = None,
    runtime: str | None = None,
    plugins: Sequence[str | Path] = (),
    trust: Sequence[str] = (),
) -> Path:
    """Make a folder of images as `synthcube infer` does; for images in memory: from_pretrained.

    What is None is taken from `config`, or else from the training.

    Args:
        model: a run, an artifact or an exported folder, or hf://owner/name.
        output: the folder to write: images, manifest.csv, grid.png and provenance.json.
        num_images: how many; or how many of each class, {"Hand": 5} or "Hand=5,HeadCT=3".
        seed: of the images.
        data: images to translate or to reconstruct, in place of a number.
        batch_size: images made at once.
        guidance: how strictly conditions are followed; 1: as learned.
        sampler, steps: how images are drawn, such as "heun" in 10.
        animate: write animation.gif too: "steps", from noise to images, or "slices" of volumes.
        config: a YAML, or its content, with other settings: {"sampling": {...}}.
        overrides: keys of that config, as in ["sampling.truncation=0.7"].
        condition: the conditions of all images, {"Label": "Hand"}.
        conditions: those of each: a CSV, or its rows.
        runtime: what computes the networks: torch, onnx or openvino.
        plugins: folders whose code it may run; see docs/how-to/own-code.md.
        trust: installed packages whose code it may run.

    Returns:
        `output`, which :func:`evaluate` takes as predictions.

    Raises:
        SynthCubeError: the request does not fit the model, or `output` holds other images.
    """
    from pathlib import Path

    from synthcube.environment import show_log
    from synthcube.plugins import vouching
    from synthcube.sharing.hub import located
    from synthcube.tasks.infer import InferRequest
    from synthcube.tasks.infer import infer as task

    with show_log(), vouching(plugins, trust):
        task(
            InferRequest(
                located(model), Path(output), num_images=num_images, seed=seed,
                data=None if data is None else Path(data), batch_size=batch_size,
                guidance=guidance, sampler=sampler, steps=steps, animate=animate,
                config=Path(config) if isinstance(config, str) else config, overrides=overrides,
                conditions=[f"{name}={value}" for name, value in (condition or {}).items()],
                conditions_table=Path(conditions) if isinstance(conditions, str) else conditions,
                runtime=runtime,
            )
        )  # fmt: skip
    return Path(output)


def evaluate(
    predictions: str | Path,
    labels: str | Path,
    output: str | Path,
    *,
    config: str | Path | Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    train_data: str | Path | None = None,
    report: str | Path | None = None,
    model: str | Path | None = None,
    plugins: Sequence[str | Path] = (),
    trust: Sequence[str] = (),
) -> dict[str, Any]:
    """Compare images with real ones as `synthcube evaluate` does.

    Args:
        predictions: the folder that :func:`infer` wrote, or any other images.
        labels: held-out real images; or a run: those that it held out.
        output: the YAML file to write the results to.
        config: a YAML, or its content, with a section `evaluation`; by default that of the run.
        overrides: keys of that config, as in ["evaluation.num_repeats=100"].
        train_data: training images, to search for copies.
        report: folder for an HTML page with plots.
        model: the model, for membership inference.
        plugins: folders whose code it may run; see docs/how-to/own-code.md.
        trust: installed packages whose code it may run.

    Returns:
        The results, as they are in `output`.

    Raises:
        SynthCubeError: the images cannot be compared, or the files cannot be written.
    """
    from pathlib import Path

    from synthcube.environment import show_log
    from synthcube.errors import EvaluationError
    from synthcube.plugins import vouching
    from synthcube.reading import read_yaml
    from synthcube.sharing.hub import located
    from synthcube.tasks.evaluate import evaluate as task

    with show_log(), vouching(plugins, trust):
        results = task(
            Path(predictions), Path(labels), Path(output),
            config_path=Path(config) if isinstance(config, str) else config,
            overrides=overrides, train_data=None if train_data is None else Path(train_data),
            report=None if report is None else Path(report),
            model_path=None if model is None else located(model),
        )  # fmt: skip
    return read_yaml(results, EvaluationError)
