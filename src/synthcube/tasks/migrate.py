"""Migrate: a project of GaNDLF-Synth becomes a config, and a manifest, of SynthCube."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from synthcube import reading, storage
from synthcube.data.manifest import manifest_text
from synthcube.data.tables import read_table
from synthcube.errors import ConfigError, OutputError, results_or_faults
from synthcube.migration import rows as csv_rows
from synthcube.migration.translation import Translation, translated

_MARK = "# Written by synthcube migrate; content "


@dataclass(frozen=True)
class Migration:
    """What was written, and what became of each key of the old file."""

    config: Path
    manifest: Path | None
    lines: tuple[str, ...]


def migrate(
    old: Path,
    output: Path,
    *,
    csv: Path | None = None,
    dims: int | None = None,
    modern: bool = False,
) -> Migration:
    """Write the config that trains what an old one trained, and the manifest where one is needed.

    Faults of both files are raised together, and then nothing is written.

    Args:
        old: YAML of GaNDLF-Synth.
        output: YAML to write; one that was edited since is not overwritten.
        csv: list of images of the old project; the manifest gets the name of `output` with .csv.
        dims: spatial axes of the images, 2 or 3, where the old YAML does not say it.
        modern: leave our defaults where the old YAML says nothing.
    """
    if output.suffix not in (".yaml", ".yml"):
        raise OutputError(f"--output_path {output}: give the name of a .yaml to write.")
    manifest = output.with_suffix(".csv") if csv else None
    storage.require_separate(
        {"--output_path": output, "the manifest": manifest}, {"OLD": old, "--csv": csv}
    )
    new, images = results_or_faults(
        lambda: _translation(old, dims, modern),
        lambda: csv_rows.translated(csv, read_table(csv), Path.cwd()) if csv else None,
    )
    texts = {output: _marked(new.text)}
    if images and images.changes and manifest:
        texts[manifest] = manifest_text(images.rows)
    _require_unedited(texts)
    storage.make_folder(output.parent, "--output_path")
    for path, text in reversed(texts.items()):  # the config last: it says that all is there
        storage.write_text(path, text)
    written = manifest if manifest in texts else None
    return Migration(output, written, tuple(_report(new, images, texts, csv)))


def _translation(old: Path, dims: int | None, modern: bool) -> Translation:
    text = reading.read_text(old, ConfigError, name="OLD")
    values, lines = reading.parse(text, str(old), as_pyyaml=True)
    if not isinstance(values, dict):
        raise ConfigError(f"{old}: a mapping of keys is needed, not {type(values).__name__}.")
    return translated(values, lines, str(old), dims=dims, modern=modern)


def _marked(text: str) -> str:
    """The text below a line with its hash, by which an edited file is recognised."""
    return f"{_MARK}{hashlib.sha256(text.encode()).hexdigest()[:16]}\n{text}"


def _require_unedited(texts: dict[Path, str]) -> None:
    faults = [
        f"{path} is there, and is not what this command would write or has written: move it, or "
        "give another --output_path"
        for path, text in texts.items()
        if path.exists() and not _is_replaceable(path, text)
    ]
    if faults:
        raise OutputError("Nothing is overwritten:", faults)


def _is_replaceable(path: Path, text: str) -> bool:
    there = reading.read_text(path, OutputError)
    _, _, below = there.partition("\n")
    return there in ("", text) or there == _marked(below)


def _report(
    new: Translation, images: csv_rows.Rows | None, texts: Iterable[Path], csv: Path | None
) -> Iterator[str]:
    headings = {
        "same": "the same", "changed": "changed", "no effect": "without effect in GaNDLF-Synth",
    }  # fmt: skip
    for kind, heading in headings.items():
        chosen = [outcome for outcome in new.outcomes if outcome.kind == kind]
        yield f"{len(chosen)} key{'' if len(chosen) == 1 else 's'} {heading}"
        for outcome in chosen:
            yield f"  {outcome.key}: {outcome.text}" if outcome.text else f"  {outcome.key}"
    yield "0 keys refused"
    if new.left:
        yield f"{len(new.left)} settings left at the defaults of SynthCube (--modern)"
        yield from (f"  {text}" for text in new.left)
    if images:
        yield from images.changes or (f"{csv} is read as it is: no manifest is needed",)
        yield from csv_rows.orientation_lines(images.rows)
    for path in texts:
        yield f"Written: {path}"
