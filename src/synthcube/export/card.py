"""The README of an exported model: a model card in the Hub's format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from synthcube import __version__, addresses, yaml_text
from synthcube.artifact import PICTURE, Artifact
from synthcube.errors import ConfigError
from synthcube.escapes import markdown
from synthcube.export.metadata import INTENDED_USE
from synthcube.export.runtimes.formats import Converted
from synthcube.export.scores import Results, Score

_NOTICE = (
    "> For research only: not a medical device, not for diagnosis, and not shown to protect the\n"
    "> privacy of the people whose images it was trained on."
)

Task = Literal["sample", "reconstruct", "translate"]
_CALLS: dict[Task, str] = {
    "sample": "images = model.sample(16, seed=1)",
    "reconstruct": 'images = model.reconstruct("YOUR_IMAGES")',
    "translate": "model.image  # what it makes; to translate images is up to the command line",
}

_OUT_OF_SCOPE = """- Diagnosis, treatment, triage, or any decision about a person.
- Images passed on as if they were of real people; whatever is made with it should say so.
- Other organs, scanners, protocols or populations than those it was trained on: it knows no others,
  and does not say so.
- A proof of privacy. That no copies were found is not that there are none."""


@dataclass(frozen=True, slots=True)
class Story:
    """What a card tells beside what the model itself knows; empty where nobody has said."""

    license_id: str = ""
    datasets: Sequence[str] = ()  # names on a Hub
    results: Results | None = None
    notes: str = ""  # Markdown of the authors
    num_images: int = 0
    num_subjects: int = 0
    place: str = "THIS_FOLDER"  # where the model is published
    has_picture: bool = False
    task: Task = "sample"
    conversions: Sequence[Converted] = ()


def model_card(trained: Artifact, story: Story) -> str:
    """Markdown with the Hub's YAML header."""
    name = trained.config["model"]["name"]
    header = yaml.safe_dump(_header(trained, story), sort_keys=False, allow_unicode=True).strip()
    picture = f"![Images made by this model]({PICTURE})\n\n" if story.has_picture else ""
    parts = [
        f"---\n{header}\n---",
        f"# {markdown(name)} trained with SynthCube {__version__}",
        _NOTICE,
        f"{picture}{_images(trained)}",
        *([story.notes.strip()] if story.notes.strip() else []),
        f"## Intended use\n\n{INTENDED_USE}",
        f"## Out of scope\n\n{_OUT_OF_SCOPE}",
        f"## Training data\n\n{_data(trained, story)}",
        f"## Training\n\n{_training(trained)}",
        f"## Evaluation\n\n{_evaluation(story.results)}",
        f"## How to run it\n\n{_commands(story)}",
        *([f"## Other runtimes\n\n{_conversions(story)}"] if story.conversions else []),
        f"## License\n\n{story.license_id or 'None was stated: without one nobody may use it.'}",
        "`config.yaml` holds every setting, `artifact.json` the SHA-256 of every file.",
    ]
    return "\n\n".join(parts) + "\n"


def header_of(card: str) -> dict[str, Any]:
    """The metadata at the top of a card; empty where there is none that can be read."""
    start, _, rest = card.partition("---\n")
    try:
        found, _ = yaml_text.parse("" if start.strip() else rest.partition("\n---")[0], "card")
    except ConfigError:
        return {}
    return found if isinstance(found, dict) else {}


def _header(trained: Artifact, story: Story) -> dict[str, Any]:
    image, model = trained.image, trained.config["model"]
    tag = "unconditional-image-generation" if story.task == "sample" else "image-to-image"
    header: dict[str, Any] = {"library_name": "synthcube"}
    header |= {"license": story.license_id} if story.license_id else {}
    header["pipeline_tag"] = tag
    tags = ["medical", "medical-imaging", "synthcube", "synthetic-data", model["name"]]
    header["tags"] = [*dict.fromkeys([*tags, f"{image.rank}d"])]
    header |= {"datasets": list(story.datasets)} if story.datasets else {}
    header |= {"base_model": bases} if (bases := _bases(trained.config)) else {}
    measured = story.results.settled if story.results else ()
    extractor = story.results.extractor if story.results else ""
    if measured:
        header["model-index"] = [
            {
                "name": f"{model['name']}-{image.rank}d",
                "results": [
                    {
                        "task": {"type": tag},
                        "dataset": {"type": "held-out", "name": "real images, held out"},
                        "metrics": [
                            {"type": each.name, "value": each.value,
                             "name": f"{each.section}: {each.name}"
                             + (f" ({extractor})" if extractor else "")}
                            for each in measured
                        ],
                    }
                ],
            }
        ]  # fmt: skip
    return header


def _bases(config: Mapping[str, Any]) -> list[str]:
    """The published models that this one was made of, whose licenses bind it."""
    named = (
        config["model"].get("first_stage"), config.get("training", {}).get("start_from")
    )  # fmt: skip
    found = [addresses.parse(str(each)) for each in named if each]
    return [*dict.fromkeys(each.repo for each in found if each)]


def _images(trained: Artifact) -> str:
    image = trained.image
    size = " x ".join(map(str, image.size))
    spacing = " x ".join(f"{each:g}" for each in image.spacing_mm[: image.rank])
    ranges = "; ".join(f"{low:g} to {high:g}" for low, high in image.intensity_range)
    follows = ", ".join(
        f"{markdown(each.name)} ({_listed(each.classes) or f'{each.low:g} to {each.high:g}'})"
        for each in image.conditions
    )
    rows = [
        ("size", size),
        ("channels", str(image.channels)),
        ("voxel size (mm)", spacing),
        ("intensities", ranges),
        ("classes", _listed(image.labels) or "none"),
        ("follows", follows or "nothing"),
    ]
    return "| images | |\n| --- | --- |\n" + _rows(rows)


def _data(trained: Artifact, story: Story) -> str:
    told = []
    if story.num_images:
        told.append(f"{story.num_images} images of {story.num_subjects} subjects in training.")
    if story.datasets:
        told.append(f"Of: {', '.join(story.datasets)}.")
    classes = _listed(trained.image.labels)
    told += [f"Classes: {classes}."] if classes else []
    if not story.datasets:
        told.append("Where they are from, its authors have not said.")
    told.append("None of them is part of this model's files, and nothing here names a subject.")
    return " ".join(told)


def _training(trained: Artifact) -> str:
    rows = [(markdown(name), f"{value:.6g}") for name, value in trained.metrics.items()]
    return "| training | |\n| --- | --- |\n" + _rows(rows)


def _evaluation(results: Results | None) -> str:
    if results is None:
        return (
            "Not evaluated: nobody has said how near these images are to real ones, or whether "
            "the model copies the images that it was trained on."
        )
    counts = ", ".join(f"{number} {markdown(name)}" for name, number in results.counts)
    extractor = markdown(results.extractor)
    measured = [
        f"By `synthcube evaluate`{f', of {counts}' if counts else ''}"
        f"{f', in features of {extractor}' if extractor else ''}. Beside each "
        "distance stands its real baseline: as many real images against other real ones.",
        "| question | measure | value | real baseline | 95% interval | count |\n"
        "| --- | --- | --- | --- | --- | --- |\n" + "\n".join(map(_score, results.scores)),
    ]
    notes = "\n".join(f"- {markdown(section)}: {markdown(note)}" for section, note in results.notes)
    return "\n\n".join([*measured, *([notes] if notes else [])])


def _score(score: Score) -> str:
    value = _shown(score.value)
    if score.reason:
        value = f"{value} ({score.reason})" if score.value is not None else score.reason
    known = score.low is not None and score.high is not None
    interval = f"{_shown(score.low)} to {_shown(score.high)}" if known else ""
    cells = (score.section, score.name, value, _shown(score.real_baseline), interval,
             "" if score.count is None else str(score.count))  # fmt: skip
    return "| " + " | ".join(map(markdown, cells)) + " |"


def _shown(number: float | None) -> str:
    return "" if number is None else f"{number:.4g}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(markdown, names))


def _rows(rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in rows)


def _conversions(story: Story) -> str:
    rows = "\n".join(
        f"| {each.runtime} {each.version.partition('-')[0]} | `--runtime {each.runtime}` | "
        f"{each.weights} | {each.largest_difference:.2g} | {each.mean_difference:.2g} |"
        for each in story.conversions
    )
    return (
        "The networks are here in other formats as well, for CPUs; images are drawn by the same "
        "sampler. Differences are from the images of torch, of the whole range.\n\n"
        "| runtime | of `synthcube infer` | weights | largest difference | mean difference |\n"
        f"| --- | --- | --- | --- | --- |\n{rows}"
    )


def _commands(story: Story) -> str:
    wish = "-n 16" if story.task == "sample" else "-d YOUR_IMAGES"
    words = f"-m {story.place} -o images {wish}"
    model = story.place.removeprefix("hf://").partition("@")[0]
    network = "-e HF_TOKEN " if story.place.startswith("hf://") else "--network none "
    return f"""Command line:

```sh
synthcube infer {words}
```

Docker, with the image that the SynthCube sources build:

```sh
docker run --rm {network}--user "$(id -u):$(id -g)" -v "$PWD:/work" -w /work synthcube:latest infer {words}
```

Python:

```python
import synthcube

model = synthcube.from_pretrained("{model}")
{_CALLS[story.task]}
```

Singularity, and MedPerf, whose containers have no network (download the model first):

```sh
singularity run --cleanenv --pwd /work --bind "$PWD:/work" synthcube.sif infer {words}
```"""  # noqa: E501  # a command is one line
