"""CPU seconds and memory that a large manifest takes: read and checked, split, its conditions."""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.process import apart
from bench.report import Options, Row

ROWS = 1_000_000
MAX_SECONDS, MAX_BYTES = 20.0, 2e9


def measure(options: Options) -> list[Row]:
    number = ROWS // 100 if options.quick else ROWS
    with TemporaryDirectory() as name:
        path = write_list(Path(name), number)
        seconds, size = apart(cost_of_reading, path)
    title = f"manifest: {{}} of {number:,} rows of {number // 10:,} subjects, split and conditions"
    return [
        Row(title.format("CPU seconds"), seconds, f"{seconds:.1f} s", at_most=MAX_SECONDS),
        Row(
            title.format("memory (GB)"), size / 1e9, f"{size / 1e9:.2f} GB", at_most=MAX_BYTES / 1e9
        ),
    ]


def write_list(folder: Path, number: int) -> Path:
    """A CSV of so many rows: ten for each subject, with classes, ages and sites; of few files."""
    for i in range(10):
        (folder / f"{i}.png").touch()
    path = folder / "manifest.csv"
    with path.open("w", encoding="utf-8") as file:
        file.write("Channel_0,SubjectID,LabelMapping,Age,Site\n")
        for i in range(number):
            subject = i % max(1, number // 10)
            file.write(
                f"{i % 10}.png,subject-{subject},class {subject % 5},{20 + i % 60},site {i % 7}\n"
            )
    return path


def cost_of_reading(path: Path) -> tuple[float, int]:
    """CPU seconds, and the largest memory of this process in bytes."""
    import resource

    from synthcube.data.conditions import condition_specs, condition_values
    from synthcube.data.manifest import read_manifest
    from synthcube.data.module import split_subjects

    start = time.process_time()
    manifest = read_manifest(path)
    rows = manifest.rows
    split_subjects(
        [row.subject for row in rows], [row.label for row in rows], {"validation": 0.1}, seed=0
    )
    kinds = {"Label": "class", "Age": "number", "Site": "class"}
    condition_values(condition_specs(manifest, range(len(rows)), kinds), rows)
    seconds = time.process_time() - start
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
