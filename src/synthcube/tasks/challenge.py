"""Challenge: the cases of a challenge in, one file for each of them out, on its own grid."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from synthcube import compute, storage
from synthcube.data.conditions import requested_values
from synthcube.data.geometry import placed_like
from synthcube.data.images import read_image
from synthcube.data.manifest import files_below, natural_key
from synthcube.data.native_grid import Bools, on_grid, write_filled, write_like
from synthcube.data.preprocessing import Prepared, Preprocessing
from synthcube.errors import ConfigError, ImageError, ManifestError, OutputError, first_faults
from synthcube.models import artifact, inference
from synthcube.sharing.challenges import (
    DECLARATION,
    MODELS,
    ChallengeTask,
    read_declaration,
    task_faults,
)
from synthcube.tasks.infer import InferRequest, stated_changes
from synthcube.tasks.loaded_model import LoadedModel, inference_settings
from synthcube.terminal import followed

log = logging.getLogger("synthcube")

_SUFFIXES = (".nii.gz", ".nii")
_SEPARATORS = "-_."


@dataclass(frozen=True, slots=True)
class Case:
    """The files of a case by their suffix."""

    name: str
    separator: str
    """Between the name of the case and a suffix."""
    files: Mapping[str, Path]
    task: ChallengeTask

    @property
    def output(self) -> str:
        """Name of the file that is written for it."""
        return f"{self.name}{self.separator}{self.task.output}.nii.gz"


def run_challenge(
    model: Path, data: Path, output: Path, *,
    weights: Path | None = None, config: Path | None = None, overrides: Sequence[str] = (),
) -> list[Path]:  # fmt: skip
    """Make the file of every case in `data`; returns the files.

    All faults of all cases are raised before anything is written. Nothing is written into `data`,
    and nothing but these files into `output`.

    Args:
        model: folder with challenge.json and the models that it names.
        data: folders of cases; names of cases may be any.
        weights: another folder of that kind; or a trained model, in place of the only one.
        config: a YAML of seed, sampling and compute, over those of the training.
        overrides: keys of that YAML as "key=value".

    Raises:
        ManifestError: files are missing.
        ImageError: an image cannot be used.
        ArtifactError: there is no model, or it is damaged.
        ConfigError: a model cannot do its task, or the settings do not fit it.
        OutputError: `output` cannot be written, or holds other files.
    """
    inputs = {"model_path": model, "data_path": data, "weights": weights, "config": config}
    storage.require_separate({"output_path": output}, inputs)
    if weights and (weights / DECLARATION).is_file():
        model, weights = weights, None
    tasks = read_declaration(model).tasks
    if weights and len(tasks) > 1:
        raise ConfigError(
            f"--weights {weights} is one model, and {model} has {len(tasks)}: give a folder with "
            f"{DECLARATION}."
        )
    cases = find_cases(data, tasks)
    models = {
        task.output: _TaskModel(
            task, InferRequest(
                weights or model / MODELS / task.output, output, config=config, overrides=overrides
            ),
        )
        for task in tasks if any(case.task == task for case in cases)
    }  # fmt: skip
    faults = []
    for case in followed(cases, len(cases), "Checking"):
        try:
            models[case.task.output].prepared(case)
        except ImageError as error:
            faults.append(f"{case.name}: {'; '.join([error.headline, *error.faults])}")
    if faults:
        raise ImageError(f"{len(faults)} of {len(cases)} cases in {data} cannot be used:",
                         first_faults(faults))  # fmt: skip
    _claim(output, {case.output for case in cases})
    paths = []
    for index, case in enumerate(followed(cases, len(cases), "Generating")):
        paths.append(output / case.output)
        models[case.task.output].make(case, index, paths[-1])
    return paths


def find_cases(data: Path, tasks: Sequence[ChallengeTask]) -> list[Case]:
    """The cases below a folder, in natural order of their names.

    A case is the files of one folder whose names are alike up to the suffix; a file whose name is
    the suffix alone belongs to the case with the name of its folder. Its task is the first whose
    files it has, without the output. Other files do not matter.

    Raises:
        ManifestError: all cases without a task, folders without a case, and names that are twice.
    """
    if not data.is_dir():
        raise ManifestError(f"data_path {data} does not exist, or is no folder.")
    known = {suffix for task in tasks for suffix in (*task.reads, task.output)}
    groups: dict[tuple[Path, str], dict[str, Path]] = {}
    separators: dict[tuple[Path, str], str] = {}
    faults = []
    for path in sorted(files_below(data)):
        if not (parts := _parts_of(path, known)):
            continue
        name, separator, suffix = parts
        files = groups.setdefault((path.parent, name), {})
        separators.setdefault((path.parent, name), separator)
        if suffix in files:
            faults.append(f"{path}: {files[suffix].name} is the same file of the same case")
        files[suffix] = path
    places: dict[str, Path] = {}
    cases = []
    for (folder, name), files in groups.items():
        reasons = {task.output: _reason(task, files) for task in tasks}
        task = next((task for task in tasks if not reasons[task.output]), None)
        if name in places:
            faults.append(f"case {name} is in {places[name]} and in {folder}")
        elif task is None:
            faults.append(f"{folder}: case {name}: {'; '.join(reasons.values())}")
        else:
            cases.append(Case(name, separators[folder, name], files, task))
        places[name] = folder
    holders = {parent for folder, _ in groups for parent in (folder, *folder.parents)}
    faults += [
        f"{folder} holds no file {_patterns(tasks)}"
        for folder in sorted(data.iterdir())
        if folder.is_dir() and folder not in holders and not folder.name.startswith(".")
    ]
    if not groups and not faults:
        faults = [f"there is no file {_patterns(tasks)}"]
    if faults:
        raise ManifestError(f"data_path {data} is not what the challenge gives:",
                            first_faults(faults))  # fmt: skip
    return sorted(cases, key=lambda case: natural_key(case.name))


def _parts_of(path: Path, known: set[str]) -> tuple[str, str, str] | None:
    """The name of the case, what separates it from the suffix, and the suffix of a file."""
    ending = next((end for end in _SUFFIXES if path.name.endswith(end)), None)
    if ending is None:
        return None
    stem = path.name.removesuffix(ending)
    if stem in known:
        return path.parent.name, "-", stem
    for suffix in sorted(known, key=len, reverse=True):
        match = re.fullmatch(rf"(.+)([{_SEPARATORS}]){re.escape(suffix)}", stem)
        if match:
            return match[1], match[2], suffix
    return None


def _reason(task: ChallengeTask, files: Mapping[str, Path]) -> str:
    """Why a case with these files is not for a task; empty where it is."""
    if lacking := [suffix for suffix in task.reads if suffix not in files]:
        return f"{task.output} is made out of {', '.join(task.reads)}, and there is no " + (
            " and no ".join(lacking)
        )
    return f"{task.output} is there already" if task.output in files else ""


def _patterns(tasks: Sequence[ChallengeTask]) -> str:
    suffixes = dict.fromkeys(suffix for task in tasks for suffix in task.reads)
    return " or ".join(f"*-{suffix}.nii.gz" for suffix in suffixes)


def _claim(output: Path, names: set[str]) -> None:
    storage.make_folder(output, "output_path")
    if others := [name for name in storage.contents(output) if name not in names]:
        raise OutputError(
            f"output_path {output} holds {others[0]}, which these cases do not have: give another "
            "one, or empty it."
        )


@dataclass(frozen=True, slots=True)
class _PreparedCase:
    """A case as its model sees it, and the grid of its files."""

    parts: list[Prepared]  # the image, or its slices
    shape: tuple[int, ...]  # (X, Y, Z) of the files
    affine: np.ndarray  # (4, 4) of the files
    mask: Bools | None  # (X, Y, Z), the voxels to make
    first: Path  # the file of which the output has the header


class _TaskModel:
    """A trained model that makes the output of its task."""

    def __init__(self, task: ChallengeTask, request: InferRequest) -> None:
        trained = artifact.load(request.model)
        if faults := task_faults(trained, task):
            raise ConfigError(f"{request.model} cannot make {task.output}:", faults)
        self.task = task
        settings = inference_settings(trained, stated_changes(request, trained))
        device = compute.device(settings["compute"]["accelerator"])
        precision, reason = compute.resolve_precision(settings["compute"]["precision"], device)
        log.info("%s: computing on %s in %s (%s).", task.output, device.type, precision, reason)
        self.model = LoadedModel(trained, settings, device, precision)
        self.seed = settings["seed"]
        self.preprocessing = Preprocessing(self.model.source_config)
        specs = trained.image.conditions
        self.values = requested_values(specs, [{spec.name: "" for spec in specs}])

    def prepared(self, case: Case) -> _PreparedCase:
        """A case, preprocessed as the images of the training were. Raises ImageError."""
        task = self.task
        image = read_image([case.files[suffix] for suffix in task.reads])
        if len(image.tensor) != len(task.reads):
            raise ImageError(
                f"its {len(task.reads)} files have {len(image.tensor)} channels; each must have one"
            )
        mask = None
        if task.mask:
            mask = image.tensor[task.reads.index(task.mask)].numpy() > 0
        sources = len(task.inputs)
        image = replace(image, tensor=image.tensor[:sources], integers=image.integers[:sources])
        cuts = self.preprocessing.images_of(image)
        parts = [replace(self.preprocessing(cut), slice=number) for number, cut in cuts]
        for part in parts:
            self.model.require_size(part.tensor.shape[1:], case.files[task.inputs[0]])
        first = case.files[task.image or task.inputs[0]]
        return _PreparedCase(parts, tuple(image.tensor.shape[1:]), image.affine, mask, first)

    def make(self, case: Case, index: int, path: Path) -> None:
        """Write the output of a case; `index` is its place among the cases."""
        prepared = self.prepared(case)
        (seed,) = inference.image_seeds(self.seed, index + 1)[-1:]
        images = []
        for span in self.model.batches(len(prepared.parts)):
            batch = [prepared.parts[place] for place in span]
            generated = self.model.generate(
                [seed] * len(batch), np.repeat(self.values, len(batch), axis=0),
                torch.stack([part.tensor for part in batch]),
            )  # fmt: skip
            images += [self._intensities(*pair) for pair in zip(generated, batch, strict=True)]
        lowest = min(float(part.min()) for part in images)
        image, affine = _assembled(images, prepared.parts, lowest)
        voxels, inside = on_grid(image, affine, prepared.shape, prepared.affine)
        if prepared.mask is None:
            integer = self.model.image.integer and self.model.postprocessing.keeps_integers
            write_like(path, prepared.first, voxels, integer=integer)
            return
        if prepared.parts[0].slice is not None:  # a slice may be left out, being all void
            slices = [torch.ones_like(part) for part in images]
            seen, _ = on_grid(
                _assembled(slices, prepared.parts, 0)[0], affine, prepared.shape, prepared.affine
            )
            inside = inside & (seen > 0)
        if beyond := int((prepared.mask & ~inside).sum()):
            log.warning(
                "%s: %d voxels of the mask lie outside of what the model sees, and become the "
                "lowest intensity.", case.name, beyond,
            )  # fmt: skip
        write_filled(path, prepared.first, voxels, prepared.mask)

    def _intensities(self, image: torch.Tensor, part: Prepared) -> torch.Tensor:
        """One channel, (*spatial), in its own units.

        What completes an image has the range of that image, unless the training had one for all.
        """
        spec, ranges = self.model.image, None
        if self.task.image and not self.model.has_fixed_range:
            ranges = np.array([part.intensity_range[self.task.inputs.index(self.task.image)]])
        placed = placed_like(spec, part.affine, part.tensor.shape[1:], ranges)
        return self.model.intensities(image, placed)[0]


def _assembled(
    images: Sequence[torch.Tensor], parts: Sequence[Prepared], left_out: float
) -> tuple[torch.Tensor, np.ndarray]:
    """The volume of these slices, (X, Y, Z), or the only image itself; and its affine.

    Args:
        left_out: the voxels of slices that were left out, because they are of one intensity.
    """
    if parts[0].slice is None:
        return images[0], parts[0].affine
    numbers = [part.slice or 0 for part in parts]
    first, last = numbers[0], numbers[-1]
    volume = torch.full((*images[0].shape, last - first + 1), left_out)
    for number, image in zip(numbers, images, strict=True):
        volume[..., number - first] = image
    return volume, parts[0].affine
