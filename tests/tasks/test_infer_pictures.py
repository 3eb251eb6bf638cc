"""grid.png and animation.gif of infer: what is where, and what is written below it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

import synthcube
from synthcube.data.geometry import PICTURE_AFFINE
from synthcube.data.phantom import write_phantoms
from synthcube.data.pictures import GAP, LINE, MIN_TILE, WRITTEN_TILE, tile
from synthcube.errors import ConfigError
from synthcube.models import registry, samplers
from synthcube.models.families.latent_diffusion import LatentDiffusionConfig
from synthcube.models.inference import generate, image_seeds
from synthcube.schema import ImageSpec

SIDE = WRITTEN_TILE


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory):
    """Trains once: a run and its data, by the kind of the images."""
    runs: dict[str, tuple[Path, Path]] = {}
    kinds = {
        "classes": ("rectified_flow", (16, 16), 1, {"conditions": {"Label": "class"}}),
        "pairs": ("rectified_flow", (16, 16), 2, {"source_channels": [0]}),
        "volumes": ("autoencoder_kl", (16, 8, 16), 1, {}),
    }

    def run(kind: str) -> tuple[Path, Path]:
        if kind not in runs:
            folder = tmp_path_factory.mktemp(kind)
            family, size, channels, data = kinds[kind]
            images = write_phantoms(
                folder / "data", num=10, size=size, channels=channels, spacing_mm=(1, 2, 1)
            ).parent
            model = registry.find(family).tiny().model_dump(mode="json")
            training = {"max_epochs": 1, "batch_size": 4, "num_sample_images": 2}
            compute = {"accelerator": "cpu", "precision": "32"}
            config = {"model": model, "training": training, "compute": compute, "data": data}
            synthcube.train(config, images, folder / "run")
            runs[kind] = folder / "run", images
        return runs[kind]

    return run


def pixels(path: Path) -> np.ndarray:
    with PIL.Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def has_text(part: np.ndarray) -> bool:
    return bool((part.min(axis=-1) > 200).any())


def enlarged(path: Path) -> np.ndarray:
    """A saved picture as a tile shows it."""
    return pixels(path).repeat(SIDE // 16, axis=0).repeat(SIDE // 16, axis=1)


def test_steps_begin_with_noise_and_end_with_what_is_saved(trained, tmp_path: Path) -> None:
    run, _ = trained("classes")
    out = synthcube.infer(
        run,
        tmp_path / "out",
        3,
        batch_size=2,
        steps=5,
        animate="steps",
        condition={"Label": "ring"},
    )
    plain = synthcube.infer(
        run, tmp_path / "plain", 3, batch_size=2, steps=5, condition={"Label": "ring"}
    )
    assert not (plain / "animation.gif").exists()
    picture = pixels(out / "grid.png")
    with PIL.Image.open(out / "animation.gif") as gif:
        assert gif.n_frames == 6, "the noise, and what each of five steps makes of it"
        frames = []
        for number in range(6):
            gif.seek(number)
            frames.append(np.asarray(gif.convert("RGB"))[LINE:])
    assert picture.shape == (SIDE + 4 * LINE, 3 * (SIDE + GAP) - GAP, 3)
    for index in range(3):
        name = f"images/{index:05d}.png"
        assert (out / name).read_bytes() == (plain / name).read_bytes(), "watching changes nothing"
        left = index * (SIDE + GAP)
        place = slice(SIDE), slice(left, left + SIDE)
        np.testing.assert_array_equal(picture[place], enlarged(out / name))
        np.testing.assert_array_equal(frames[-1][place], picture[place])
        assert (frames[0][place] != picture[place]).mean() > 0.3
        below = picture[SIDE:, left : left + SIDE]
        # its name, its class, and a seed of 18 or 19 digits on a line of its own
        assert [has_text(below[n * LINE : (n + 1) * LINE]) for n in range(4)] == [True] * 4
    seed = image_seeds(0, 1)[0]
    start = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(seed))
    np.testing.assert_array_equal(frames[0][:SIDE, :SIDE], tile(start).pixels)


def test_a_translation_is_between_its_source_and_the_truth(trained, tmp_path: Path) -> None:
    run, data = trained("pairs")
    out = synthcube.infer(run, tmp_path / "out", data=data, animate="steps", steps=2)
    picture = pixels(out / "grid.png")
    width = SIDE + GAP
    assert picture.shape[1] == 3 * width - GAP, "eight rows of three"
    pitch = (len(picture) - LINE + GAP) // 8
    for column in range(3):
        assert has_text(picture[:LINE, column * width : column * width + 60])
    with PIL.Image.open(out / "animation.gif") as gif:
        gif.seek(gif.n_frames - 1)
        assert gif.n_frames == 3
        last = np.asarray(gif.convert("RGB"))[2 * LINE :][:SIDE]
    for row in range(8):
        shown = picture[LINE + row * pitch :][:SIDE]
        parts = [shown[:, n * width : n * width + SIDE] for n in range(3)]
        name = f"phantom-{row:05d}"
        written = next((out / "images").glob(f"*-{name}.png"))
        np.testing.assert_array_equal(parts[1], enlarged(written))
        for part, channel in ((parts[0], 0), (parts[2], 1)):
            saved = enlarged(data / f"{name}_c{channel}.png")
            # stretched to the range of the training
            assert np.corrcoef(part[..., 0].ravel(), saved[..., 0].ravel())[0, 1] > 0.99
        if row == 0:
            for column, part in enumerate(parts):
                left = column * width
                np.testing.assert_array_equal(last[:, left : left + SIDE], part)


def test_a_reconstruction_is_beside_its_original_slice_by_slice(trained, tmp_path: Path) -> None:
    run, data = trained("volumes")
    out = synthcube.infer(run, tmp_path / "out", data=data, animate="slices")
    picture = pixels(out / "grid.png")
    assert picture.shape[1] == 2 * (3 * SIDE + 2) + GAP
    assert (len(picture) - 3 * LINE + GAP) % 8 == 0, "headings, planes and a note around rows"
    with PIL.Image.open(out / "animation.gif") as gif:
        assert gif.n_frames == 16
        assert gif.size[0] == 2 * SIDE + GAP, "16 x 8 voxels of 1 x 2 mm are a square"
        gif.seek(8)
        middle = np.asarray(gif.convert("RGB"))[3 * LINE :]
    for column in range(2):
        shown = middle[:SIDE, column * (SIDE + GAP) :][:, :SIDE]
        axial = picture[2 * LINE :][:SIDE, column * (3 * SIDE + 2 + GAP) :][:, :SIDE]
        np.testing.assert_array_equal(shown, axial)
    with PIL.Image.open(out / "animation.gif") as gif:
        first = np.asarray(gif.convert("RGB"))[3 * LINE :]
    assert (first[:SIDE, :SIDE] != middle[:SIDE, :SIDE]).any()


def test_what_cannot_be_animated_is_refused_before_anything_is_written(
    trained, tmp_path: Path
) -> None:
    (flat, _), (volumes, data) = trained("classes"), trained("volumes")
    with pytest.raises(ConfigError, match="animate is slices, and the images are 2D: use steps"):
        synthcube.infer(flat, tmp_path / "out", config={"sampling": {"animate": "slices"}})
    with pytest.raises(ConfigError, match="autoencoder_kl makes these images in one step: use sli"):
        synthcube.infer(volumes, tmp_path / "out", data=data, animate="steps")
    assert not (tmp_path / "out").exists()


def test_latents_are_seen_as_images() -> None:
    image = ImageSpec(
        size=(16, 16), channels=1, spacing_mm=(1, 1, 1), affine=PICTURE_AFFINE,
        intensity_range=((0, 255),), file_format="png",
    )  # fmt: skip
    torch.manual_seed(0)
    family = LatentDiffusionConfig.tiny().build(image).eval()
    call = (family, [1, 2, 3], np.zeros((3, 0), np.float32), "32-true", torch.device("cpu"))
    with samplers.watched(2, num_images=2) as moments:
        images = generate(*call)
    assert [share for share, _ in moments] == [0, pytest.approx(2 / 3)]
    assert [tuple(moment.shape) for _, moment in moments] == [(2, 1, 16, 16)] * 2
    assert not torch.equal(moments[0][1], images[:2])
    assert torch.equal(generate(*call), images)
    assert len(moments) == 2, "only what is drawn inside is seen"


def test_sample_pictures_of_a_training_name_what_they_show(trained) -> None:
    def sample(kind: str) -> np.ndarray:
        return pixels(trained(kind)[0] / "samples" / "epoch_0001.png")

    pairs = sample("pairs")  # two rows: source, generated, truth, below a title and headings
    assert pairs.shape == (2 * LINE + 2 * (MIN_TILE + GAP) - GAP, 3 * (MIN_TILE + GAP) - GAP, 3)
    dark, light = pairs[2 * LINE :, :MIN_TILE, 0], pairs[2 * LINE :, -MIN_TILE:, 0]
    assert np.corrcoef(dark[:MIN_TILE].ravel(), light[:MIN_TILE].ravel())[0, 1] < -0.99, (
        "the truth is the source with dark and bright exchanged"
    )
    for start in (0, MIN_TILE + GAP, 2 * (MIN_TILE + GAP)):
        assert has_text(pairs[LINE : 2 * LINE, start : start + MIN_TILE])
    classes = sample("classes")
    assert classes.shape == (2 * LINE + SIDE, 2 * (SIDE + GAP) - GAP, 3)
    assert has_text(classes[:LINE]), "the epoch"
    assert has_text(classes[-LINE:, :SIDE]), "the class"
    assert sample("volumes").shape[1] == 2 * (3 * MIN_TILE + 2) + GAP
