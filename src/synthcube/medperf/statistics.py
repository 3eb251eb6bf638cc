"""Task `statistics`: summarize prepared images in a file that identifies no person.

The file leaves the site.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from synthcube import __version__, reading, storage
from synthcube.data.conditions import cell, parse_number
from synthcube.data.geometry import spacing_of
from synthcube.data.images import read_image
from synthcube.data.manifest import Manifest, Row, read_manifest
from synthcube.environment import derived_seed
from synthcube.errors import ManifestError
from synthcube.medperf.infer import PreparatorConfig, read_parameters
from synthcube.medperf.prepared_folder import changed_files

_PERCENTILES = (5, 25, 50, 75, 95)
_VALUES_SAMPLED = 4096  # of each image
_IMAGES_SAMPLED = 1000
_DIGITS = 4

Plain = dict[str, Any]


def statistics(
    data_path: Path, labels_path: Path, output_path: Path, *, parameters_file: Path | None = None
) -> Path:
    """Write counts, sizes, spacings and intensities of both folders; return `output_path`.

    Groups of fewer than `smallest_group` subjects are left out, and so are larger groups from which
    their size could be computed. There are no names, paths, dates, minima or maxima.

    Raises:
        ConfigError: the parameters are not valid.
        ManifestError: a folder was not prepared.
        OutputError: `output_path` cannot be written.
    """
    storage.require_separate(
        {"output_path": output_path},
        {"data_path": data_path, "labels_path": labels_path, "parameters_file": parameters_file},
    )
    storage.require_own_file(output_path, "synthcube:", "output_path")
    settings = read_parameters(parameters_file, PreparatorConfig)
    summary: Plain = {"synthcube": __version__, "smallest_group": settings.smallest_group}
    for name, folder in (("data", data_path), ("labels", labels_path)):
        if faults := changed_files(folder):
            raise ManifestError(f"{name}_path {folder} is not as prepare wrote it:", faults)
        summary[name] = _side_summary(read_manifest(folder), settings)
    storage.write_mounted(output_path, reading.dump(summary))
    return output_path


def shown_groups(groups: Mapping[str, int], smallest: int) -> dict[str, int]:
    """Return the groups that may be published, with their sizes.

    Groups smaller than `smallest` are left out. If their sum is also smaller, the total would
    reveal it: then the smallest of the other groups is left out as well.
    """
    shown = {name: size for name, size in groups.items() if size >= smallest}
    hidden = sum(groups.values()) - sum(shown.values())
    if 0 < hidden < smallest and shown:
        del shown[min(shown, key=lambda name: shown[name])]
    return shown


def _side_summary(manifest: Manifest, settings: PreparatorConfig) -> Plain:
    rows, smallest = manifest.rows, settings.smallest_group
    subjects = len({row.subject for row in rows})
    if subjects < smallest:
        return {"images": None, "reason": f"there are fewer than {smallest} subjects"}
    kinds: dict[str, str] = {"Label": "class"} if manifest.labels else {}
    kinds |= settings.data.conditions
    columns = {name: [cell(row, name) for row in rows] for name in kinds}
    if any(row.split for row in rows):
        kinds["Split"] = "class"
        columns["Split"] = [row.split for row in rows]
    conditions = {
        name: _classes(rows, columns[name], smallest)
        if kind == "class"
        else _numbers(rows, columns[name], smallest)
        for name, kind in kinds.items()
    }
    return {
        "images": len(rows),
        "subjects": subjects,
        "conditions": conditions,
        **_image_summary(rows, smallest),
    }


def _classes(rows: Sequence[Row], cells: Sequence[str], smallest: int) -> Plain:
    """Return the number of subjects of each class."""
    owners: dict[str, set[str]] = {}
    for row, text in zip(rows, cells, strict=True):
        owners.setdefault(text or "(unknown)", set()).add(row.subject)
    sizes = {name: len(subjects) for name, subjects in owners.items()}
    shown = shown_groups(sizes, smallest)
    return {"subjects": shown, "some_left_out": len(shown) < len(sizes)}


def _numbers(rows: Sequence[Row], cells: Sequence[str], smallest: int) -> Plain:
    """Return mean and standard deviation over subjects, after averaging each subject's images."""
    values: dict[str, list[float]] = {}
    for row, text in zip(rows, cells, strict=True):
        if (number := parse_number(text)) is not None:
            values.setdefault(row.subject, []).append(number)
    known = len(values)
    unknown = len({row.subject for row in rows}) - known
    if known < smallest:
        return {"mean": None, "reason": f"fewer than {smallest} subjects have a value"}
    # If few subjects have no value, the count is left out: its difference to all would reveal them.
    count = {"subjects": known} if unknown == 0 or unknown >= smallest else {}
    return count | _mean_and_std([float(np.mean(numbers)) for numbers in values.values()])


def _image_summary(rows: Sequence[Row], smallest: int) -> Plain:
    sizes: dict[str, set[str]] = {}
    spacings: list[npt.NDArray[np.float64]] = []
    moments: list[npt.NDArray[np.float64]] = []  # (C, 2) each: mean and mean square
    samples: list[npt.NDArray[np.float32]] = []  # (C, values) each
    rng = np.random.default_rng(derived_seed(0, "statistics"))
    sampled = set(rng.permutation(len(rows))[:_IMAGES_SAMPLED].tolist())
    for index, row in enumerate(rows):
        image = read_image(row.channels)
        voxels = image.tensor.flatten(1).numpy()  # (C, voxels)
        shape = [side for side in image.tensor.shape[1:] if side > 1]
        sizes.setdefault(" x ".join(map(str, shape)), set()).add(row.subject)
        spacings.append(spacing_of(image.affine))
        exact = voxels.astype(np.float64)
        moments.append(np.stack([exact.mean(axis=1), (exact**2).mean(axis=1)], axis=1))
        if index in sampled:
            samples.append(voxels[:, rng.integers(voxels.shape[1], size=_VALUES_SAMPLED)])
    if len({moment.shape for moment in moments}) > 1:
        raise ManifestError("The images differ in their channels: run sanity_check to list them.")
    counts = {size: len(subjects) for size, subjects in sizes.items()}
    return {
        "channels": len(moments[0]),
        "size": shown_groups(counts, smallest),
        "spacing_mm": [_mean_and_std(axis) for axis in np.array(spacings).T],
        "intensity": [
            _intensity(moment, np.concatenate(sample))
            for moment, sample in zip(
                np.mean(moments, axis=0), zip(*samples, strict=True), strict=True
            )
        ],
    }


def _intensity(moment: npt.NDArray[np.float64], sample: npt.NDArray[np.float32]) -> Plain:
    """Summarize all voxels of a channel; every image has the same weight."""
    mean, square = moment
    percentiles = np.percentile(sample, _PERCENTILES)
    return {
        "mean": _rounded(mean),
        "std": _rounded(max(square - mean**2, 0.0) ** 0.5),
        "percentiles": {
            str(p): _rounded(v) for p, v in zip(_PERCENTILES, percentiles, strict=True)
        },
    }


def _mean_and_std(values: Iterable[float]) -> Plain:
    numbers = np.fromiter(values, np.float64)
    return {"mean": _rounded(numbers.mean()), "std": _rounded(numbers.std())}


def _rounded(number: float) -> float:
    return float(f"{float(number):.{_DIGITS}g}")
