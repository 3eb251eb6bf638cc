"""Members are recognised where a model has them by heart, and nobody where it has not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from synthcube.data.cache import load_images
from synthcube.data.manifest import read_manifest, write_manifest
from synthcube.data.preprocessing import DataConfig
from synthcube.evaluation.membership import membership
from synthcube.evaluation.sets import open_sets
from synthcube.models import artifact, registry
from synthcube.schema import Batch, Condition, ConditionSpec, ImageSpec

EYE = np.eye(4).tolist()


def texture(number: int, seed: int, side: int = 16) -> np.ndarray:
    """Smooth random pictures, (number, side, side), each unlike the others."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(number, 1, 5, 5, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic")[:, 0]
    return (fine.clamp(0, 1) * 255).round().numpy().astype(np.uint8)


def folder(path: Path, images: np.ndarray, classes: list[str] | None = None) -> Path:
    path.mkdir()
    rows = []
    for i, image in enumerate(images):
        Image.fromarray(image).save(path / f"{i:03d}.png")
        row = {"Channel_0": f"{i:03d}.png", "SubjectID": f"{path.name}-{i}"}
        rows.append(row | ({"Label": classes[i % len(classes)]} if classes else {}))
    write_manifest(path / "manifest.csv", rows)
    return path


def learned(name: str, data: Path, out: Path, steps: int, classes: tuple[str, ...] = ()) -> None:
    """An artifact of the tiny family, after so many steps on all images of `data`."""
    torch.manual_seed(0)
    conditions = (ConditionSpec(name="Label", kind="class", classes=classes),) if classes else ()
    spec = ImageSpec(
        size=(16, 16), channels=1, spacing_mm=(1, 1, 1), affine=EYE,
        intensity_range=((0.0, 255.0),), file_format="png", conditions=conditions,
    )  # fmt: skip
    config = registry.find(name).tiny()
    family = config.build(spec)
    images = load_images(read_manifest(data), DataConfig(), out.parent / "cache")
    voxels = torch.from_numpy(images.read(range(len(images))))
    number = torch.arange(len(voxels)) % max(1, len(classes))
    values = number[:, None].float() if classes else torch.zeros(len(voxels), 0)
    batch = Batch(
        image=voxels, label=torch.zeros(len(voxels), dtype=torch.int64),
        index=torch.arange(len(voxels)), augmented=False,
        condition=Condition(values=values, source=voxels[:, :0]),
    )  # fmt: skip
    optimizer = torch.optim.Adam(family.parameters(), lr=5e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        family.loss(batch)["loss"].backward()
        optimizer.step()
    section = {
        "seed": 0,
        "model": config.model_dump(mode="json"),
        "data": DataConfig().model_dump(mode="json"),
        "sampling": {},
        "compute": {},
    }
    artifact.save(out, config=section, image=spec, weights=family.state_dict(), metrics={})


def sets(tmp_path: Path, **folders: Path):
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    manifests = {name: read_manifest(folder) for name, folder in folders.items()}
    loaded, faults = open_sets(manifests, DataConfig(), work)
    assert not faults
    return loaded["predictions"], loaded["labels"], loaded["train_data"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps"), [("rectified_flow", 250), ("autoencoder_kl", 150)])
def test_a_model_that_knows_its_images_by_heart_gives_them_away(
    tmp_path: Path, name: str, steps: int
) -> None:
    train = folder(tmp_path / "train", texture(8, 0))
    labels = folder(tmp_path / "labels", texture(8, 1))
    strangers = folder(tmp_path / "strangers", texture(8, 2))
    predictions = folder(tmp_path / "made", texture(8, 3))
    learned(name, train, tmp_path / "model", steps)
    model = artifact.load(tmp_path / "model")
    cache = tmp_path / "cache"
    known = membership(
        *sets(tmp_path, predictions=predictions, labels=labels, train_data=train), 0, model, cache
    ).measures["auc_model"]
    assert known.value > 0.9
    assert known.low > 0.5
    fresh = membership(
        *sets(tmp_path, predictions=predictions, labels=labels, train_data=strangers), 0, model,
        cache,
    ).measures["auc_model"]  # fmt: skip
    assert fresh.low <= 0.5 <= fresh.high


def test_copies_among_the_predictions_give_their_originals_away(image_set) -> None:
    train, held = texture(150, 0)[:, None], texture(150, 1)[:, None]
    predictions = texture(300, 2)[:, None]
    t, held_out = image_set("train", train), image_set("labels", held)
    fresh = membership(image_set("made", predictions), held_out, t, 0)
    assert fresh.measures["auc_samples"].low <= 0.5 <= fresh.measures["auc_samples"].high
    assert fresh.measures["tpr_samples"].value < 0.05
    predictions[:60] = train[:60]
    leaky = membership(image_set("leaky", predictions), held_out, t, 0)
    assert leaky.measures["auc_samples"].low > 0.55
    assert leaky.measures["tpr_samples"].value >= 0.4 - 1e-9
    assert leaky.measures["tpr_samples"].real_baseline == 0.01
    assert leaky.plain()["auc_model"] == {"value": None, "reason": "the model was not given"}
    assert leaky.plain() == membership(image_set("leaky", predictions), held_out, t, 0).plain()


def test_few_images_have_no_rate_at_one_percent(image_set) -> None:
    train, held, predictions = (image_set(n, texture(20, i)[:, None])
                         for i, n in enumerate(("train", "labels", "made")))  # fmt: skip
    plain = membership(predictions, held, train, 0).plain()
    assert plain["auc_samples"]["value"] is not None
    assert plain["tpr_samples"]["value"] is None
    assert "at least 100 are needed" in plain["tpr_samples"]["reason"]
    few = image_set("few", texture(3, 5)[:, None])
    assert membership(predictions, few, train, 0).plain()["auc_samples"]["value"] is None


def test_labels_among_the_training_images_void_it(image_set) -> None:
    images = texture(20, 0)[:, None]
    section = membership(
        image_set("made", texture(20, 1)[:, None]), image_set("labels", images),
        image_set("train", images), 0,
    ).plain()  # fmt: skip
    assert section["auc_samples"]["value"] is None
    assert "20 of them are training images" in section["auc_samples"]["reason"]


@pytest.mark.parametrize(("name", "reason"), [("dcgan", "against a discriminator")])
def test_a_family_without_a_loss_of_single_images_says_so(tmp_path: Path, name, reason) -> None:
    train, labels = (folder(tmp_path / n, texture(8, i)) for i, n in enumerate(("train", "labels")))
    learned(name, train, tmp_path / "model", 0)
    images = sets(tmp_path, predictions=labels, labels=labels, train_data=train)
    model = artifact.load(tmp_path / "model")
    plain = membership(*images, 0, model, tmp_path / "cache").plain()
    assert plain["auc_model"]["value"] is None
    assert reason in plain["auc_model"]["reason"]


def test_classes_that_the_model_does_not_know_are_a_reason_and_no_crash(
    tmp_path: Path, caplog
) -> None:
    train = folder(tmp_path / "train", texture(8, 0), ["a", "b"])
    labels = folder(tmp_path / "labels", texture(8, 1), ["a", "c"])
    learned("rectified_flow", train, tmp_path / "model", 2, ("a", "b"))
    images = sets(tmp_path, predictions=train, labels=labels, train_data=train)
    model = artifact.load(tmp_path / "model")
    plain = membership(*images, 0, model, tmp_path / "cache").plain()
    assert plain["auc_model"]["value"] is None
    assert "cannot score these images" in plain["auc_model"]["reason"]
    assert "column Label: c is none of the classes" in caplog.text
    images = sets(tmp_path, predictions=train, labels=folder(
        tmp_path / "known", texture(8, 2), ["b", "a"]), train_data=train)  # fmt: skip
    assert membership(*images, 0, model, tmp_path / "cache").measures["auc_model"].value
