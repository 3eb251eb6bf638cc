"""The numbers of `synthcube evaluate`, as a card shows them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from synthcube import __version__, environment, reading
from synthcube.errors import ArtifactError, ConfigError, EvaluationError
from synthcube.escapes import markdown
from synthcube.models import artifact
from synthcube.models.artifact import PICTURE, Artifact
from synthcube.schema import ImageSpec
from synthcube.sharing.config import VERSION
from synthcube.sharing.conversion import ConversionRecord

_MARK = "synthcube_evaluation"


@dataclass(frozen=True, slots=True)
class Score:
    """One measure of results.yaml."""

    section: str
    name: str
    value: float | None
    real_baseline: float | None
    low: float | None
    high: float | None
    count: int | None
    reason: str


@dataclass(frozen=True, slots=True)
class Results:
    """What a card takes of results.yaml."""

    scores: tuple[Score, ...]
    notes: tuple[tuple[str, str], ...]
    """(section, sentence)."""
    counts: tuple[tuple[str, int], ...]
    """(set of images, how many)."""
    extractor: str

    @property
    def settled(self) -> tuple[Score, ...]:
        """Those whose number needs no word of caution: for fields without room for one."""
        return tuple(each for each in self.scores if each.value is not None and not each.reason)

    @property
    def prose(self) -> str:
        """All that is said in words."""
        return "\n".join(
            [*(each.reason for each in self.scores), *(text for _, text in self.notes)]
        )


def read_results(path: Path) -> Results:
    """Read the file that `synthcube evaluate` wrote.

    Raises:
        EvaluationError: it is none, or holds no number.
    """
    found = reading.read_yaml(path, EvaluationError, name="--evaluation")
    if _MARK not in found:
        raise EvaluationError(
            f"--evaluation {path}: this is not what synthcube evaluate wrote (results.yaml)."
        )
    sections = {
        str(name): section
        for name, section in found.items()
        if isinstance(section, Mapping) and any(map(_is_measure, section.values()))
    }
    if not sections:
        raise EvaluationError(f"--evaluation {path}: there is no measure in it.")
    return Results(
        tuple(score for name, section in sections.items() for score in _scores(name, section)),
        tuple(
            (name, str(note))
            for name, section in sections.items()
            for note in _listed_scores(section.get("notes"))
        ),
        tuple(_counts(found.get("images"))),
        _extractor(found.get("extractor")),
    )


def _is_measure(value: Any) -> bool:
    return isinstance(value, Mapping) and "value" in value


def _scores(section: str, measures: Mapping[str, Any]) -> Iterator[Score]:
    for name, each in measures.items():
        if _is_measure(each):
            count = _number(each.get("count"))
            yield Score(
                section, str(name), _number(each["value"]), _number(each.get("real_baseline")),
                _number(each.get("low")), _number(each.get("high")),
                None if count is None else int(count), str(each.get("reason") or ""),
            )  # fmt: skip


def _number(value: Any) -> float | None:
    usable = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if usable and math.isfinite(value) else None


def _listed_scores(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _counts(images: Any) -> Iterator[tuple[str, int]]:
    for name, each in (images if isinstance(images, Mapping) else {}).items():
        count = _number(each.get("count")) if isinstance(each, Mapping) else None
        if count is not None:
            yield str(name), int(count)


def _extractor(record: Any) -> str:
    return str(record.get("name", "")) if isinstance(record, Mapping) else ""


METADATA = "metadata.json"
INTENDED_USE = (
    "Research on medical imaging: augmentation, method development, teaching. Not a medical "
    "device, not for diagnosis or treatment, and not shown to protect the privacy of the people "
    "whose images it was trained on."
)
_SCHEMA = (
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/"
    "meta_schema_20240725.json"
)
_UNKNOWN = "not stated"
_BEYOND_MONAI = ("synthcube", "lightning", "diffusers", "pydantic", "safetensors", "torchio")


def metadata(
    trained: Artifact, *, version: str, license_id: str = "", results: Results | None = None
) -> dict[str, Any]:
    """The content of metadata.json.

    Args:
        version: of the model, such as 1.0.0.

    """
    image, name = trained.image, trained.config["model"]["name"]
    installed = environment.versions()
    source = len(image.source_channels)
    given = _tensor(trained, source, "images to translate") if source else None
    scores = results.settled if results else ()
    return {
        "schema": _SCHEMA,
        "version": version,
        "changelog": {version: f"exported with SynthCube {__version__}"},
        "monai_version": installed.get("monai", _UNKNOWN),
        "pytorch_version": installed.get("torch", _UNKNOWN),
        "numpy_version": installed.get("numpy", _UNKNOWN),
        "required_packages_version": {
            each: installed[each] for each in _BEYOND_MONAI if each in installed
        },
        "name": f"{name} {image.rank}D",
        "task": f"Generation of {image.rank}D medical images",
        "description": f"A {name} of SynthCube that makes images of "
        f"{' x '.join(map(str, image.size))} voxels with {image.channels} channel(s).",
        "authors": _UNKNOWN,
        "copyright": f"license: {license_id}" if license_id else _UNKNOWN,
        "data_type": image.file_format,
        "image_classes": ", ".join(image.labels) or "one class",
        "eval_metrics": {f"{each.section}/{each.name}": each.value for each in scores},
        "intended_use": INTENDED_USE,
        "references": [],
        "network_data_format": {
            "inputs": {"image": given} if given else {"seed": _tensor(trained, 1, "a seed")},
            "outputs": {"pred": _tensor(trained, image.channels, "images")},
        },
    }


def version_of(folder: Path) -> str:
    """The version of an exported model.

    Raises:
        ArtifactError: metadata.json is missing or does not say.
    """
    version = reading.read_object(folder / METADATA, ArtifactError).get("version")
    if not isinstance(version, str) or not VERSION.fullmatch(version):
        raise ArtifactError(
            f"{folder / METADATA} does not say the model's version: export it again."
        )
    return version


def _tensor(trained: Artifact, channels: int, what: str) -> dict[str, Any]:
    image = trained.image
    is_seed = what == "a seed"
    return {
        "type": "integer" if is_seed else "image",
        "format": "seed" if is_seed else "magnitude",
        "num_channels": channels,
        "spatial_shape": [1] if is_seed else list(image.size),
        "dtype": "int64" if is_seed else "float32",
        "value_range": [0, 2**53] if is_seed else [-1, 1],
        "is_patch_data": False,
        "channel_def": {str(index): f"{what}, channel {index}" for index in range(channels)},
    }


InferTask = Literal["generate", "translate", "reconstruct"]

RESEARCH_ONLY = "For research only: not a medical device, not for diagnosis."
_BEGINNINGS: dict[InferTask, str] = {
    "generate": "Synthetic images: each was made out of noise by",
    "translate": "Images derived from real images of real people: each was translated by",
    "reconstruct": "Images derived from real images of real people: each was reconstructed by",
}
_PERSONAL_MADE = (
    "None is meant to be there: the images are made out of noise, and a SubjectID is the number of "
    "an image. Only as far as that was tested: this description was searched for the names of "
    "users, machines and known subjects. Whether an image is a copy of one that the model was "
    "trained on was not tested here; `synthcube evaluate` looks for copies, and finding none does "
    "not show that there are none.",
)
_PERSONAL_DERIVED = (
    "Yes: every image is derived from a real image of a real person, may show what identifies that "
    "person, and is to be protected as the original is.",
    "The names of the image files and manifest.csv tell the subjects' ids, and manifest.csv tells "
    "where the originals lie: neither is fit to be published. This description names no subject "
    "and no original.",
)
_LIMITS = (
    "Not for diagnosis, treatment, triage, or any decision about a person.",
    "Not to be passed on as images that a scanner has taken.",
    "The model knows no organs, scanners, protocols or populations other than those it was trained "
    "on, and does not say where its knowledge ends.",
    "What looks like anatomy or a lesion may be an invention of the model, and what is rare may be "
    "missing: nobody has looked at each image.",
)
_NOT_JUDGED = "How near the images are to real ones is not told here; `synthcube evaluate` says it."


@dataclass(frozen=True, slots=True)
class MadeImages:
    """A folder of images that infer has made, without anything that names people or places."""

    image: ImageSpec
    family: str
    model_sha256: str  # of the artifact's index, which holds the hash of every file of the model
    task: InferTask
    seed: int | None  # None where nothing is drawn
    number: int
    columns: Sequence[str]  # of manifest.csv
    steps: Sequence[str] = ()  # names of what was done to each after the model
    manifest_sha256: str = "0" * 64

    @property
    def is_derived(self) -> bool:
        """Whether they are made out of real images."""
        return self.task != "generate"

    @property
    def words(self) -> tuple[str, ...]:
        """All that is told of them in words that are not SynthCube's."""
        named = [(each.name, *each.classes) for each in self.image.conditions]
        return (self.family, *self.steps, *(word for words in named for word in words))

    @property
    def model(self) -> str:
        return (
            f"a {self.family} with SynthCube {__version__} (SHA-256 of its artifact.json: "
            f"{self.model_sha256})"
        )


def summary(images: MadeImages) -> str:
    """What the images are, in a few sentences."""
    image = images.image
    size = " x ".join(map(str, image.size))
    spacing = " x ".join(f"{each:g}" for each in image.spacing_mm[: image.rank])
    warning = " They are personal data wherever the originals are." if images.is_derived else ""
    return (
        f"{_origin(images)}{warning} {images.number} image(s) of {size} voxels with "
        f"{image.channels} channel(s), {spacing} mm. {RESEARCH_ONLY}"
    )


def disclosure(images: MadeImages) -> dict[str, Any]:
    """The terms of the RAI vocabulary, and where the images are from as PROV-O says it."""
    derived = images.is_derived
    source = (
        "Real images of real people, which are not part of this data set and are not named here."
        if derived
        else "None: the images begin as noise. The model was trained on real images, which are not "
        "part of this data set."
    )
    personal = _PERSONAL_DERIVED if derived else _PERSONAL_MADE
    steps = ", ".join(images.steps) or "nothing"
    return {
        "rai:hasSyntheticData": True,  # not of RAI 1.0: what NeurIPS 2026 asks for beside it
        "rai:dataCollection": f"Not collected but computed. {_origin(images)}",
        "rai:dataCollectionType": ["Others"],
        "rai:dataCollectionRawData": source,
        "rai:dataManipulationProtocol": f"Done to each image after the model: {steps}.",
        "rai:dataAnnotationProtocol": _annotation(images),
        "rai:dataUseCases": [INTENDED_USE],
        "rai:dataLimitations": [*_LIMITS, _NOT_JUDGED],
        "rai:dataBiases": [
            "Those of the images that the model was trained on, and the model may have made them "
            "worse: what is frequent there can be more frequent here."
        ],
        "rai:dataSocialImpact": "Made images that pass for real ones mislead: say of everything "
        "that is made with them that they are synthetic.",
        "rai:personalSensitiveInformation": list(personal),
        "prov:wasGeneratedBy": {
            "@type": "prov:Activity",
            "prov:label": images.task,
            "prov:used": {"@type": "prov:Entity", "prov:label": images.model},
        },
    }


def _origin(images: MadeImages) -> str:
    seed = "" if images.seed is None else f", seed {images.seed}"
    return f"{_BEGINNINGS[images.task]} {images.model}{seed}."


def _annotation(images: MadeImages) -> str:
    if not images.image.conditions:
        return "No annotations."
    return (
        "Nobody annotated the images: their columns say what the model was told to follow, which "
        "is not proof that it did."
    )


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
class CardContext:
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
    conversions: Sequence[ConversionRecord] = ()


def model_card(trained: Artifact, context: CardContext) -> str:
    """Markdown with the Hub's YAML header."""
    name = trained.config["model"]["name"]
    header = yaml.safe_dump(_header(trained, context), sort_keys=False, allow_unicode=True).strip()
    picture = f"![Images made by this model]({PICTURE})\n\n" if context.has_picture else ""
    parts = [
        f"---\n{header}\n---",
        f"# {markdown(name)} trained with SynthCube {__version__}",
        _NOTICE,
        f"{picture}{_images(trained)}",
        *([context.notes.strip()] if context.notes.strip() else []),
        f"## Intended use\n\n{INTENDED_USE}",
        f"## Out of scope\n\n{_OUT_OF_SCOPE}",
        f"## Training data\n\n{_data(trained, context)}",
        f"## Training\n\n{_training(trained)}",
        f"## Evaluation\n\n{_evaluation(context.results)}",
        f"## How to run it\n\n{_commands(context)}",
        *([f"## Other runtimes\n\n{_conversions(context)}"] if context.conversions else []),
        f"## License\n\n{context.license_id or 'None was stated: without one nobody may use it.'}",
        "`config.yaml` holds every setting, `artifact.json` the SHA-256 of every file.",
    ]
    return "\n\n".join(parts) + "\n"


def header_of(card: str) -> dict[str, Any]:
    """The metadata at the top of a card; empty where there is none that can be read."""
    start, _, rest = card.partition("---\n")
    try:
        found, _ = reading.parse("" if start.strip() else rest.partition("\n---")[0], "card")
    except ConfigError:
        return {}
    return found if isinstance(found, dict) else {}


def _header(trained: Artifact, context: CardContext) -> dict[str, Any]:
    image, model = trained.image, trained.config["model"]
    tag = "unconditional-image-generation" if context.task == "sample" else "image-to-image"
    header: dict[str, Any] = {"library_name": "synthcube"}
    header |= {"license": context.license_id} if context.license_id else {}
    header["pipeline_tag"] = tag
    tags = ["medical", "medical-imaging", "synthcube", "synthetic-data", model["name"]]
    header["tags"] = [*dict.fromkeys([*tags, f"{image.rank}d"])]
    header |= {"datasets": list(context.datasets)} if context.datasets else {}
    header |= {"base_model": bases} if (bases := _bases(trained.config)) else {}
    measured = context.results.settled if context.results else ()
    extractor = context.results.extractor if context.results else ""
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
    found = [artifact.parse(str(each)) for each in named if each]
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


def _data(trained: Artifact, context: CardContext) -> str:
    told = []
    if context.num_images:
        told.append(f"{context.num_images} images of {context.num_subjects} subjects in training.")
    if context.datasets:
        told.append(f"Of: {', '.join(context.datasets)}.")
    classes = _listed(trained.image.labels)
    told += [f"Classes: {classes}."] if classes else []
    if not context.datasets:
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


def _conversions(context: CardContext) -> str:
    rows = "\n".join(
        f"| {each.runtime} {each.version.partition('-')[0]} | `--runtime {each.runtime}` | "
        f"{each.weights} | {each.largest_difference:.2g} | {each.mean_difference:.2g} |"
        for each in context.conversions
    )
    return (
        "The networks are here in other formats as well, for CPUs; images are drawn by the same "
        "sampler. Differences are from the images of torch, of the whole range.\n\n"
        "| runtime | of `synthcube infer` | weights | largest difference | mean difference |\n"
        f"| --- | --- | --- | --- | --- |\n{rows}"
    )


def _commands(context: CardContext) -> str:
    wish = "-n 16" if context.task == "sample" else "-d YOUR_IMAGES"
    words = f"-m {context.place} -o images {wish}"
    model = context.place.removeprefix("hf://").partition("@")[0]
    network = "-e HF_TOKEN " if context.place.startswith("hf://") else "--network none "
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
{_CALLS[context.task]}
```

Singularity, and MedPerf, whose containers have no network (download the model first):

```sh
singularity run --cleanenv --pwd /work --bind "$PWD:/work" synthcube.sif infer {words}
```"""  # noqa: E501  # a command is one line
