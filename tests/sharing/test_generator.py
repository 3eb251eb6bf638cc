"""synthcube.from_pretrained: the same images as the command line, for those who work in Python."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

import synthcube
from synthcube.errors import ArtifactError, ConfigError, FamilyError, HubError, ImageError
from synthcube.tasks.train import train


@pytest.fixture
def flow(first_stage):
    return synthcube.from_pretrained(first_stage("rectified_flow"), accelerator="cpu")


def test_a_seed_means_the_image_that_infer_writes(flow, cli, first_stage, tmp_path: Path) -> None:
    run, out = first_stage("rectified_flow"), tmp_path / "images"
    assert cli("infer", "-m", run, "-o", out, "-n", 3, "--seed", 7)[0] == 0
    images = flow.sample(3, seed=7)
    for path in images.save(tmp_path / "ours"):
        assert path.read_bytes() == (out / "images" / path.name).read_bytes()
    pieces = flow.sample(3, seed=7, batch_size=2).tensor
    torch.testing.assert_close(pieces, images.tensor, atol=1e-4, rtol=0)
    assert not torch.allclose(flow.sample(3, seed=8).tensor, images.tensor, atol=0.1)


def test_images_are_arrays_and_pictures(flow) -> None:
    images = flow.sample(2)
    assert len(images) == 2
    assert images.numpy().shape == (2, 1, 16, 16)
    assert images[0].min() >= 0
    assert images[0].max() > 1, "in the units of the pictures, not of the model"
    np.testing.assert_array_equal(np.stack(list(images)), images.numpy())
    with PIL.Image.open(io.BytesIO(images._repr_png_())) as picture:
        assert picture.format == "PNG"
        assert picture.size == images.picture().size
    assert repr(images) == "Images(2 of 1 x 16 x 16)"
    assert repr(flow) == "Generator(rectified_flow, 16 x 16, 1 channel(s))"


def test_conditions_are_followed_or_explained(tiny_config, phantoms, tmp_path, cli) -> None:
    run = tmp_path / "run"
    train(tiny_config(), phantoms, run, overrides=["data.conditions={Label: class}"])
    model = synthcube.from_pretrained(run, accelerator="cpu")
    assert model.conditions == {"Label": ("disc", "square", "ring")}
    one = model.sample(2, seed=1, condition={"Label": "ring"})
    images = model.sample(2, seed=1, condition=[{"Label": "ring"}, {"Label": "disc"}])
    assert torch.equal(one.tensor[0], images.tensor[0])
    assert not torch.equal(one.tensor[1], images.tensor[1])
    words = ("infer", "-m", run, "-o", tmp_path / "images", "-n", 2, "--seed", 1)
    assert cli(*words)[0] == 0
    (path, *_) = model.sample(2, seed=1).save(tmp_path / "ours")
    assert path.read_bytes() == (tmp_path / "images" / "images" / path.name).read_bytes()
    with pytest.raises(ConfigError, match="'hand' is not among the classes disc, square, ring"):
        model.sample(1, condition={"Label": "hand"})
    with pytest.raises(ConfigError, match="1 conditions for 2 images"):
        model.sample(2, condition=[{"Label": "ring"}])
    with pytest.raises(ConfigError, match="n is 0"):
        model.sample(0)


def test_reconstructions(first_stage, phantoms: Path, cli, tmp_path: Path, flow) -> None:
    run = first_stage("vqvae")
    model = synthcube.from_pretrained(run, accelerator="cpu")
    images = model.reconstruct(phantoms, batch_size=5)
    assert len(images) == 12
    assert cli("infer", "-m", run, "-d", phantoms, "-o", tmp_path / "out")[0] == 0
    theirs = sorted((tmp_path / "out" / "images").iterdir())
    for ours, path in zip(images.save(tmp_path / "ours"), theirs, strict=True):
        assert ours.read_bytes() == path.read_bytes()
    again = model.reconstruct(torch.zeros(2, 1, 16, 16))
    assert again.tensor.shape == (2, 1, 16, 16)
    with pytest.raises(ImageError, match=r"The images are \[1, 8, 8\]"):
        model.reconstruct(torch.zeros(2, 1, 8, 8))
    with pytest.raises(FamilyError, match="does not make images out of nothing"):
        model.sample(1)
    with pytest.raises(FamilyError, match="does not reconstruct images: use sample"):
        flow.reconstruct(phantoms)


def test_what_is_neither_here_nor_a_name(tmp_path: Path, hub) -> None:
    with pytest.raises(ArtifactError, match="there is no such folder"):
        synthcube.from_pretrained(tmp_path / "none")
    with pytest.raises(ArtifactError, match="there is no such folder"):
        synthcube.from_pretrained("./none/there")
    with pytest.raises(HubError, match="there is no such model"):
        synthcube.from_pretrained("alice/none")
