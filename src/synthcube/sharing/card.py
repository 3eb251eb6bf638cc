"""The model card: all that it says of a model, and the numbers of `synthcube evaluate` in it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from synthcube import __version__, environment, reading
from synthcube.errors import ConfigError, EvaluationError
from synthcube.escapes import markdown
from synthcube.models import artifact
from synthcube.models.artifact import PICTURE, Artifact
from synthcube.schema import PrivacyStatement
from synthcube.sharing.conversion import ConversionRecord

_USE = (
    "Research on medical imaging: augmentation, method development, teaching. Not a medical "
    "device, not for diagnosis or treatment"
)
INTENDED_USE = (
    f"{_USE}, and not shown to protect the privacy of the people whose images it was trained on."
)
_NOTICE = (
    "> For research only: not a medical device, not for diagnosis, and not shown to protect the\n"
    "> privacy of the people whose images it was trained on."
)
_PRIVATE_NOTICE = (
    "> For research only: not a medical device, not for diagnosis. What it may tell of one person\n"
    "> is bounded by a number, with limits: see Privacy."
)
_NOT_PROMISED = """Not covered by these numbers:

- other runs on the same people, also those that were thrown away, and settings that were chosen by
  looking at their images: they are not counted;
- the weights that it started from, which are as private as their own training was;
- subjects that were held out, and every number and picture of an evaluation against real images;
- the number of subjects, which is treated as public;
- attacks on the rounding of floating-point numbers: the noise comes from the operating system, but
  is not hardened against them.

The promise is about each person alone, not about what people have in common, and an epsilon above
10 is little of a promise."""

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
        return tuple(score for score in self.scores if score.value is not None and not score.reason)

    @property
    def prose(self) -> str:
        """All that is said in words."""
        return "\n".join(
            [*(score.reason for score in self.scores), *(text for _, text in self.notes)]
        )


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
    metrics = {markdown(name): f"{value:.6g}" for name, value in trained.metrics.items()}
    parts = [
        f"---\n{header}\n---",
        f"# {markdown(name)} trained with SynthCube {__version__}",
        _PRIVATE_NOTICE if trained.privacy else _NOTICE,
        f"{picture}{_images(trained)}",
        *([context.notes.strip()] if context.notes.strip() else []),
        f"## Intended use\n\n{intended_use(trained)}",
        f"## Out of scope\n\n{_OUT_OF_SCOPE}",
        f"## Training data\n\n{_data(trained, context)}",
        f"## Training\n\n{_table('training', metrics)}",
        *([f"## Privacy\n\n{_privacy(trained.privacy)}"] if trained.privacy else []),
        f"## Evaluation\n\n{_evaluation(context.results)}",
        f"## How to run it\n\n{_commands(context)}",
        *([f"## Other runtimes\n\n{_conversions(context)}"] if context.conversions else []),
        f"## License\n\n{context.license_id or 'None was stated: without one nobody may use it.'}",
        "`config.yaml` holds every setting, `artifact.json` the SHA-256 of every file.",
    ]
    return "\n\n".join(parts) + "\n"


def intended_use(trained: Artifact) -> str:
    """What a model is for, and whether the privacy of people is bounded."""
    if trained.privacy is None:
        return INTENDED_USE
    return f"{_USE}. What it may tell of one person is bounded by epsilon and delta."


def header_of(card: str) -> dict[str, Any]:
    """The metadata at the top of a card; empty where there is none that can be read."""
    start, _, rest = card.partition("---\n")
    try:
        header, _ = reading.parse("" if start.strip() else rest.partition("\n---")[0], "card")
    except ConfigError:
        return {}
    return header if isinstance(header, dict) else {}


def read_results(path: Path) -> Results:
    """Read the file that `synthcube evaluate` wrote; an EvaluationError if it is another one."""
    content = reading.read_yaml(path, EvaluationError, name="--evaluation")
    if _MARK not in content:
        raise EvaluationError(
            f"--evaluation {path}: this is not what synthcube evaluate wrote (results.yaml)."
        )
    extractor = content.get("extractor")
    sections = {
        str(name): section
        for name, section in content.items()
        if isinstance(section, Mapping) and any(map(_is_measure, section.values()))
    }
    if not sections:
        raise EvaluationError(f"--evaluation {path}: there is no measure in it.")
    return Results(
        tuple(score for name, section in sections.items() for score in _scores(name, section)),
        tuple(
            (name, str(note))
            for name, section in sections.items()
            if isinstance(section.get("notes"), list)
            for note in section["notes"]
        ),
        tuple(_counts(content.get("images"))),
        str(extractor.get("name", "")) if isinstance(extractor, Mapping) else "",
    )


def _header(trained: Artifact, context: CardContext) -> dict[str, Any]:
    environment.ready_hub()
    from huggingface_hub import EvalResult, ModelCardData

    model, rank = trained.config["model"], f"{trained.image.rank}d"
    task = _pipeline_tag(trained, context)
    results = context.results
    extractor = f" ({results.extractor})" if results and results.extractor else ""
    data = ModelCardData(
        library_name="synthcube",
        license=context.license_id or None,
        pipeline_tag=task,
        tags=[
            "medical", "medical-imaging", "synthcube", "synthetic-data", model["name"], rank,
            *(["conditional-image-generation"] if trained.image.conditions else []),
        ],
        datasets=list(context.datasets) or None,
        base_model=_bases(trained.config) or None,
        model_name=f"{model['name']}-{rank}",
        eval_results=[
            EvalResult(
                task_type=task or "other", dataset_type="held-out",
                dataset_name="real images, held out",
                metric_type=score.name, metric_value=score.value,
                metric_name=f"{score.section}: {score.name}{extractor}",
            )
            for score in (results.settled if results else ())
        ] or None,
    )  # fmt: skip
    fields: dict[str, Any] = data.to_dict()  # type: ignore[no-untyped-call]
    fields.pop("model_name", None)  # the client puts it into the list of results
    return fields


def _pipeline_tag(trained: Artifact, context: CardContext) -> str | None:
    """The Hub's name of the task; None of a model that follows a class or a number, for which the
    Hub has no name: it takes no text, and is not unconditional."""
    if context.task != "sample":
        return "image-to-image"
    return None if trained.image.conditions else "unconditional-image-generation"


def _bases(config: Mapping[str, Any]) -> list[str]:
    """The published models that this one was made of, whose licenses bind it."""
    names = [config["model"].get("first_stage"), config.get("training", {}).get("start_from")]
    bases = [artifact.parse(str(name)) for name in names if name]
    return [*dict.fromkeys(base.repo for base in bases if base)]


def _images(trained: Artifact) -> str:
    image = trained.image
    size = " x ".join(map(str, image.size))
    spacing = " x ".join(f"{length:g}" for length in image.spacing_mm[: image.rank])
    ranges = "; ".join(
        f"{low:g} to {high:g}"
        if channel not in image.masks
        else f"mask of classes {', '.join(map(str, image.masks[channel]))}"
        for channel, (low, high) in enumerate(image.intensity_range)
    )
    follows = ", ".join(
        f"{markdown(spec.name)} ({_listed(spec.classes) or f'{spec.low:g} to {spec.high:g}'})"
        for spec in image.conditions
    )
    rows = {
        "size": f"{size} (patches of larger images)" if image.patches else size,
        "channels": image.channels,
        "voxel size (mm)": spacing,
        "intensities": ranges,
        "classes": _listed(image.labels) or "none",
        "follows": follows or "nothing",
    }
    return _table("images", rows)


def _data(trained: Artifact, context: CardContext) -> str:
    sentences = []
    if context.num_images:
        sentences.append(
            f"{context.num_images} images of {context.num_subjects} subjects in training."
        )
    if context.datasets:
        sentences.append(f"Of: {', '.join(context.datasets)}.")
    if classes := _listed(trained.image.labels):
        sentences.append(f"Classes: {classes}.")
    if not context.datasets:
        sentences.append("Where they are from, its authors have not said.")
    sentences.append(
        "None of them is part of this model's files, and nothing here names a subject."
    )
    return " ".join(sentences)


def _privacy(privacy: PrivacyStatement) -> str:
    """What a differentially private training promises, on what that rests, and what is left out."""
    start = privacy.start_sha256
    stage = privacy.first_stage_sha256
    audit = privacy.canary_audit
    is_federated = bool(privacy.sites)
    of_one = {
        "sampling": f"{markdown(privacy.sampling)}; each joins a step with probability "
        f"{privacy.sample_rate:.4g}",
        "subjects": privacy.subjects,
        "steps": privacy.steps,
        "noise multiplier (sigma)": f"{privacy.sigma:.4g}",
    }
    rows = {
        "epsilon": _rounded_up(privacy.epsilon) + (", the largest of any site" * is_federated),
        "delta": f"{privacy.delta:.2g}",
        "unit": markdown(privacy.unit),
        "accountant": markdown(privacy.accountant),
        **({"sampling": markdown(privacy.sampling)} if is_federated else of_one),
        "clip norm": f"{privacy.clip_norm:g}",
        "start": f"weights with the SHA-256 {markdown(start)}" if start else "random weights",
        **({"first stage": f"weights with the SHA-256 {markdown(stage)}"} if stage else {}),
        "canary audit": "not made of this model"
        if audit is None
        else f"epsilon is at least {audit:.3g}",
    }
    return (
        "Trained with differential privacy (DP-SGD): with or without the images of any one "
        "subject, the trained weights are nearly as likely.\n\n"
        f"{_table('privacy', rows)}\n\n{_of_sites(privacy)}{_NOT_PROMISED}"
    )


def _of_sites(privacy: PrivacyStatement) -> str:
    """What each site of a federation has done and spent; empty without sites."""
    if not privacy.sites:
        return ""
    lines = [
        f"| {markdown(label)} | {_rounded_up(site.epsilon)} | {site.subjects} | "
        f"{site.sample_rate:.4g} | {site.steps} | {site.sigma:.4g} |"
        for label, site in privacy.sites.items()
    ]
    return (
        "Each site trained privately on its own subjects, and averaging spends nothing more. A "
        "subject with images at several sites is promised the sum of their epsilons and deltas "
        "alone. The sites have told these numbers themselves:\n\n"
        "| site | epsilon | subjects | probability to join a step | steps | sigma |\n"
        "| --- | --- | --- | --- | --- | --- |\n" + "\n".join(lines) + "\n\n"
    )


def _rounded_up(epsilon: float) -> str:
    return f"{math.ceil(100 * epsilon) / 100:g}"  # never less than was spent


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


def _table(title: str, rows: Mapping[str, object]) -> str:
    lines = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"| {title} | |\n| --- | --- |\n{lines}"


def _conversions(context: CardContext) -> str:
    rows = "\n".join(
        f"| {record.runtime} {record.version.partition('-')[0]} | `--runtime {record.runtime}` | "
        f"{record.weights} | {record.largest_difference:.2g} | {record.mean_difference:.2g} |"
        for record in context.conversions
    )
    return (
        "The networks are here in other formats as well, for CPUs; images are drawn by the same "
        "sampler. Differences are from the images of torch, of the whole range.\n\n"
        "| runtime | of `synthcube infer` | weights | largest difference | mean difference |\n"
        f"| --- | --- | --- | --- | --- |\n{rows}"
    )


def _commands(context: CardContext) -> str:
    option = "-n 16" if context.task == "sample" else "-d YOUR_IMAGES"
    words = f"-m {context.place} -o images {option}"
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


def _is_measure(value: Any) -> bool:
    return isinstance(value, Mapping) and "value" in value


def _scores(section: str, measures: Mapping[str, Any]) -> Iterator[Score]:
    for name, measure in measures.items():
        if _is_measure(measure):
            count = _number(measure.get("count"))
            value, baseline = _number(measure["value"]), _number(measure.get("real_baseline"))
            low, high = _number(measure.get("low")), _number(measure.get("high"))
            yield Score(
                section, str(name), value, baseline, low, high,
                None if count is None else int(count), str(measure.get("reason") or ""),
            )  # fmt: skip


def _number(value: Any) -> float | None:
    usable = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if usable and math.isfinite(value) else None


def _counts(images: Any) -> Iterator[tuple[str, int]]:
    for name, images_of_set in (images if isinstance(images, Mapping) else {}).items():
        count = _number(images_of_set.get("count")) if isinstance(images_of_set, Mapping) else None
        if count is not None:
            yield str(name), int(count)
