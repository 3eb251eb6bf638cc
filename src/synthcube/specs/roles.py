"""MedPerf's three containers: their tasks, and where it mounts what each reads and writes."""

from __future__ import annotations

from synthcube.specs.tables import Parameter, Role, Task


def _parameters(text: str) -> Parameter:
    place = "parameters/parameters.yaml"
    return Parameter("parameters_file", "file", "parameters.yaml", text, place, optional=True)


def _additional(text: str, *, optional: bool = True) -> Parameter:
    place = "additional_files"
    return Parameter(place, "directory", place, text, place, optional)


_PREPARED = (
    Parameter("data_path", "directory", "data", "images that prepare wrote", "data"),
    Parameter(
        "labels_path", "directory", "labels", "reference images that prepare wrote", "labels"
    ),
)

PREPARATOR = Role(
    "preparator",
    "Brings the images of a site to one orientation, spacing and size, and checks them.",
    tasks=(
        Task(
            "prepare",
            "Check the raw images and bring them to one orientation, spacing and size.",
            inputs=(
                Parameter(
                    "data_path", "directory", "raw_data", "images, with or without a manifest.csv",
                    "raw_data",
                ),
                Parameter(
                    "labels_path", "directory", "raw_labels",
                    "reference images, or a CSV of SubjectID and conditions", "raw_labels",
                ),
                _parameters("data: orientation, spacing, size"),
            ),
            outputs=(
                Parameter("output_path", "directory", "data", "images and their manifest", "data"),
                Parameter(
                    "output_labels_path", "directory", "labels",
                    "reference images and their manifest", "labels",
                ),
                Parameter(
                    "report_file", "file", "report/report.yaml", "how each subject fared",
                    "report/report.yaml", optional=True,
                ),
                Parameter(
                    "metadata_path", "directory", "metadata",
                    "settings, versions, list of images", "metadata", optional=True,
                ),
            ),
        ),
        Task(
            "sanity_check",
            "Fail where prepared images are damaged, of different shapes, constant, or leak.",
            inputs=(
                *_PREPARED,
                _parameters("data: spacing and size to expect"),
                _additional("lists (voxels.json) of images that are used elsewhere"),
            ),
            outputs=(),
        ),
        Task(
            "statistics",
            "Count and summarize, in groups too large to tell of one person.",
            inputs=(*_PREPARED, _parameters("smallest_group, and data.conditions to summarize")),
            outputs=(
                Parameter(
                    "output_path", "file", "statistics/statistics.yaml", "the summary",
                    "statistics/statistics.yaml",
                ),
            ),
        ),
    ),
    parameters="""\
# As in the YAML of a training. What is not here: docs/reference.md of SynthCube, section data.
data:
  size: null          # voxels along each axis, such as [64, 64]; null: images already agree
  spacing_mm: null    # voxel size to resample to; null: the source's
  fit: resize         # or crop_or_pad
  conditions: {}      # columns that must be there, such as {Label: class, Age: number}
smallest_group: 5     # statistics does not tell of fewer subjects than this
""",
)  # fmt: skip

MODEL = Role(
    "model",
    "Generates images, or reconstructs or translates those of a site.",
    tasks=(
        Task(
            "infer",
            "Generate images, or reconstruct or translate the prepared ones.",
            inputs=(
                Parameter("data_path", "directory", "data", "images that prepare wrote", "data"),
                _parameters("task, conditions, seed, sampling, compute"),
                _additional("the trained model", optional=False),
            ),
            outputs=(
                Parameter(
                    "output_path", "directory", "predictions", "images and their manifest",
                    "predictions",
                ),
            ),
        ),
    ),
    parameters="""\
task: generate        # or reconstruct, translate: the prepared images
conditions: drawn     # or prepared, if the model follows any: those of the prepared images in turn
beyond_training: refuse  # or leave_out: prepared conditions that the model does not know
seed: 0
sampling:
  num_images: 16      # left out, with conditions: prepared: one for each prepared image
  batch_size: 16
""",
)  # fmt: skip

EVALUATOR = Role(
    "evaluator",
    "Judges predictions against the reference images of a site.",
    tasks=(
        Task(
            "evaluate",
            "Compare predictions with the reference images.",
            inputs=(
                Parameter(
                    "predictions", "directory", "predictions", "images that infer wrote",
                    "predictions",
                ),
                Parameter(
                    "labels", "directory", "labels", "reference images that prepare wrote",
                    "labels",
                ),
                _parameters("evaluation, seed"),
                _additional("train_data: training images; weights of the feature network"),
            ),
            outputs=(
                Parameter(
                    "output_path", "file", "results/results.yaml", "the numbers, to be uploaded",
                    "results/results.yaml",
                ),
                Parameter(
                    "local_outputs_path", "directory", "local_outputs",
                    "report and numbers of each case, which stay at the site", "local_outputs",
                    optional=True,
                ),
            ),
        ),
    ),
    parameters="""\
# What is not here: docs/reference.md of SynthCube, section evaluation.
evaluation:
  extractor: {name: efficientnet-lite0}  # its weights are in the image
""",
)  # fmt: skip

ROLES = (PREPARATOR, MODEL, EVALUATOR)


def mounts(task: str) -> dict[str, str]:
    """Where MedPerf mounts what a task of one of its roles reads and writes, by name."""
    (found,) = (each for role in ROLES for each in role.tasks if each.name == task)
    return {each.name: each.mount for each in (*found.inputs, *found.outputs)}
