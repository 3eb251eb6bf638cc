"""MedPerf's run_script: a model that is registered as an asset, infer and evaluate in one task.

The model is a folder of files that MedPerf brings to the site. The container has no weights, so
that one container serves all models of a benchmark.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from synthcube import storage
from synthcube.evaluation.config import EvaluationConfig
from synthcube.medperf.evaluate import evaluate
from synthcube.medperf.infer import ModelConfig, infer, read_parameters

RESULTS = "results.yaml"


class ScriptConfig(ModelConfig):
    """What the model is to do, and how its images are judged."""

    evaluation: EvaluationConfig = Field(
        default=EvaluationConfig(), description="As in a training."
    )


def run_script(
    data_path: Path,
    labels_path: Path,
    model_files: Path,
    results_path: Path,
    *,
    parameters_file: Path | None = None,
) -> Path:
    """Write results.yaml, and nothing else, to a folder; the images are made and removed again.

    Args:
        data_path: prepared images, whose conditions the generated ones may follow.
        labels_path: prepared reference images.
        model_files: folder with one trained model.

    Raises:
        ConfigError: the parameters are not valid, or ask for what the model cannot follow.
        ArtifactError: model_files holds no trained model, several, or a damaged one.
        EvaluationError: the images cannot be compared, or the results would name a file, a folder
            or a subject of the site.
        OutputError: `results_path` cannot be written.
    """
    parameters = read_parameters(parameters_file, ScriptConfig)
    storage.require_separate(
        {"results_path": results_path},
        {
            "data_path": data_path, "labels_path": labels_path, "model_files": model_files,
            "parameters_file": parameters_file,
        },
    )  # fmt: skip
    storage.make_folder(results_path, "results_path")
    of_model = parameters.model_dump(exclude={"evaluation"}, exclude_unset=True)
    judged = {
        "seed": parameters.seed,
        "evaluation": parameters.evaluation.model_dump(mode="json", exclude_unset=True),
    }
    with storage.scratch_folder() as folder:
        predictions = folder / "predictions"
        infer(data_path, predictions, model_files, parameters=ModelConfig(**of_model))
        return evaluate(predictions, labels_path, results_path / RESULTS, parameters=judged)
