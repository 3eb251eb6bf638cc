"""What whoever gets made images has to know: how they came about, of whom they tell, their limits.

In the terms of the Croissant RAI vocabulary 1.0 (http://mlcommons.org/croissant/RAI/1.0).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from synthcube import __version__
from synthcube.export.metadata import INTENDED_USE
from synthcube.schema import ImageSpec

Task = Literal["generate", "translate", "reconstruct"]

RESEARCH_ONLY = "For research only: not a medical device, not for diagnosis."
_BEGINNINGS: dict[Task, str] = {
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
    task: Task
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
