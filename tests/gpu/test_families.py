"""Every family on a GPU: it trains, resumes to the bit, and makes the images that a CPU makes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from synthcube.data.manifest import read_manifest
from synthcube.data.module import DataModule
from synthcube.data.preprocessing import DataConfig
from synthcube.models import artifact, inference, registry
from synthcube.models.family import Reconstructs, Samples
from synthcube.tasks.train import train
from synthcube.training import checkpoints

# Warnings of other hardware are shown, and are no errors.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

TWO_STEPS = ("training.batch_size=8", "model.scheduler=null")
"""A step an epoch, in two epochs. A schedule would depend on the number of epochs."""

DISTANCE = {"32-true": 0.002, "16-mixed": 0.003, "bf16-mixed": 0.02}
"""Mean absolute difference from the CPU's images in float32, whose range is [-1, 1].

About four times what a CPU differs by in these precisions; in 32-true cuDNN may compute in TF32,
which has the ten binary digits of float16. Where codes are chosen, a rounding may choose another
one, so it is the mean that is compared and not the largest difference.
"""


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "artifact" / "weights.safetensors")


@pytest.mark.parametrize("family", registry.names())
def test_two_steps_and_a_resumed_run_is_the_same_to_the_bit(
    family: str, tiny_config, train_here: Callable[..., Path], device: torch.device
) -> None:
    settings = (*TWO_STEPS, "compute.deterministic=true", "compute.precision=auto")
    config = tiny_config(family)
    straight = train_here(config, "straight", *settings)
    stopped = train_here(config, "stopped", *settings, "training.max_epochs=1")
    train_here(config, "stopped", *settings)
    assert checkpoints.reached(straight / "checkpoints" / checkpoints.LAST) == (2, 2)
    before, after = weights(straight), weights(stopped)
    assert before.keys() == after.keys()
    assert all(torch.isfinite(value).all() for value in before.values())
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    record = (straight / "environment.json").read_text(encoding="utf-8")
    assert (device.type == "cpu") or torch.cuda.get_device_name() in record


@pytest.mark.parametrize("precision", ["32", "16", "bf16"])
@pytest.mark.parametrize("family", registry.names())
def test_it_trains_in_every_precision(
    family: str, precision: str, tiny_config, train_here: Callable[..., Path], accelerator: str
) -> None:
    if (precision, accelerator) == ("16", "cpu"):
        pytest.skip("a CPU does not train in float16")
    run = train_here(
        tiny_config(family), "run", f"compute.precision={precision}", "training.max_epochs=1"
    )
    assert all(torch.isfinite(value).all() for value in weights(run).values())
    assert (run / "samples" / "epoch_0001.png").is_file()


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, first_stage) -> Callable[[str], Path]:
    """The run folder of a family that was trained on a CPU in float32, once for all tests."""
    from synthcube import reading
    from synthcube.data.phantom import write_phantoms

    runs: dict[str, Path] = {}

    def run(family: str) -> Path:
        if family not in runs:
            folder = tmp_path_factory.mktemp(f"{family}-on-cpu")
            kind = registry.find(family)
            model = kind.tiny().model_dump(mode="json")
            if kind.needs:
                model["first_stage"] = str(first_stage(kind.needs))
            content = {
                "model": model,
                "training": {"max_epochs": 2, "batch_size": 4, "sample_every_n_epochs": 0},
                "compute": {"accelerator": "cpu", "precision": "32"},
            }
            config = folder / "config.yaml"
            config.write_text(reading.dump(content), encoding="utf-8")
            data = write_phantoms(folder / "data", num=12, size=(16, 16)).parent
            train(config, data, folder / "run")
            runs[family] = folder / "run"
        return runs[family]

    return run


def images_of(run: Path, on: torch.device, precision: str, data: Path) -> list[torch.Tensor]:
    """What the model samples from three seeds, and its reconstructions, where it can do so."""
    family = artifact.load(run).build(torch.device("cpu")).eval()
    # Networks begin with layers of zeros, which would hide most of what is computed.
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in family.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    family.to(on)
    images = []
    if isinstance(family, Samples):
        seeds = inference.image_seeds(3, 3)
        values = np.zeros((3, len(family.image.conditions)), np.float32)
        images.append(inference.generate(family, seeds, values, precision, on))
    if isinstance(family, Reconstructs):
        module = DataModule(
            read_manifest(data), DataConfig(), batch_size=3, seed=0, cache=data / "cache"
        )
        originals = module.examples([0, 1, 2])["image"]
        images.append(inference.reconstruct(family, originals, precision, on))
    return images


@pytest.mark.parametrize("precision", DISTANCE)
@pytest.mark.parametrize("family", registry.names())
def test_the_same_seed_and_weights_make_the_images_of_a_cpu(
    family: str, precision: str, trained, device: torch.device, phantoms: Path
) -> None:
    run = trained(family)
    expected = images_of(run, torch.device("cpu"), "32-true", phantoms)
    images = images_of(run, device, precision, phantoms)
    assert expected
    for one, other in zip(expected, images, strict=True):
        assert one.shape == other.shape == (3, 1, 16, 16)
        assert other.device.type == "cpu"
        assert other.abs().max() <= 1
        distance = float((one - other).abs().mean())
        print(f"{family} in {precision}: mean difference {distance:.2g}")  # pytest -rP shows it
        assert distance <= DISTANCE[precision]
