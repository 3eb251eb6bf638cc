"""A converted model makes the images of torch, through the whole sampler, whatever its family."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from monai.networks.blocks import Upsample

from synthcube.data.conditions import draw_missing_conditions, requested_values
from synthcube.errors import ArtifactError, ConfigError, FamilyError
from synthcube.models import inference
from synthcube.models.family import Reconstructs, Samples
from synthcube.sharing.conversion import ConversionRecord, convert, substitute

CPU = torch.device("cpu")
SAMPLERS = (
    "rectified_flow", "ddpm", "latent_diffusion", "dcgan", "stylegan", "code_prior",
)  # fmt: skip
WITHIN = 1e-3 * 2  # of the range, which is that of [-1, 1]


def images(family, number: int, batch: int) -> torch.Tensor:
    """`number` images of given seeds, `batch` at once."""
    drawn = []
    if isinstance(family, Samples):
        seeds, specs = inference.image_seeds(5, number), family.image.conditions
        wishes: list[dict[str, str]] = [{} for _ in seeds]
        values = draw_missing_conditions(requested_values(specs, wishes), specs, wishes, seeds)
        for start in range(0, number, batch):
            rows = slice(start, start + batch)
            drawn.append(inference.generate(family, seeds[rows], values[rows], "32-true", CPU))
    if isinstance(family, Reconstructs):
        shape = (number, family.image.channels, *family.image.size)
        pixels = torch.rand(shape, generator=torch.Generator().manual_seed(5)) * 2 - 1
        for start in range(0, number, batch):
            part = pixels[start : start + batch]
            drawn.append(inference.reconstruct(family, part, "32-true", CPU))
    return torch.cat(drawn)


def agrees(family, folder: Path, runtime: str) -> ConversionRecord:
    """Convert; then other images than those it was checked with, in batches of 1, 3 and 4."""
    expected = images(family, 4, batch=4)
    assert expected.std() > 0.01, "images without any content would agree anyhow"
    record = convert(family, folder, runtime)
    assert record.largest_difference <= 1e-3
    _destroy(family, record.networks)
    for batch in (1, 3, 4):
        exact = images(family, 4, batch)
        torch.testing.assert_close(exact, expected, atol=WITHIN, rtol=0)
    return record


def _destroy(family, names) -> None:
    """Who still computes with torch's weights would make other images from now on."""
    for name in names:
        network = family.get_submodule(name)
        for weight in (*network.parameters(), *network.buffers()):
            weight.data.zero_()


@pytest.mark.parametrize("name", ["dcgan", "code_prior", "vqvae"])
@pytest.mark.parametrize("runtime", ["openvino", "onnx"])
def test_converted_networks_make_the_images_of_torch(name, runtime, family, tmp_path) -> None:
    agrees(family(name), tmp_path, runtime)


@pytest.mark.slow
@pytest.mark.parametrize(("runtime", "rank"), [("openvino", 2), ("openvino", 3), ("onnx", 3)])
@pytest.mark.parametrize("name", [*SAMPLERS, "autoencoder_kl", "vqvae"])
def test_every_family_makes_the_images_of_torch(name, rank, runtime, family, tmp_path) -> None:
    agrees(family(name, rank, conditions=name in SAMPLERS), tmp_path, runtime)


@pytest.mark.slow
def test_the_flow_follows_its_conditions_with_guidance(family, tmp_path) -> None:
    model = family("rectified_flow", conditions=True, guidance=3.0, num_sampling_steps=4)
    agrees(model, tmp_path, "openvino")


def test_earlier_weights_are_converted_too(family, tmp_path) -> None:
    model = family("rectified_flow", autoguidance_from=0.25, autoguidance=1.5)
    model.earlier.keep(model.network)
    for weight in model.network.parameters():
        weight.data *= 1.05
    record = agrees(model, tmp_path, "onnx")
    assert {"network", "earlier.network"} <= set(record.networks)


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"mode": "regression", "start": "source"},
        {"wavelet_levels": 1, "refinement_channels": 4},
    ],
)
def test_what_translates_is_converted_with_its_source(keys, family, tmp_path) -> None:
    model = family("rectified_flow", translates=True, num_sampling_steps=2, **keys)
    seeds, values = inference.image_seeds(5, 3), torch.zeros(3, 0).numpy()
    source = torch.rand(3, 1, 16, 16) * 2 - 1
    arguments = (model, seeds, values, "32-true", CPU, source)
    expected = inference.generate(*arguments)
    record = convert(model, tmp_path, "openvino")
    _destroy(model, record.networks)
    torch.testing.assert_close(inference.generate(*arguments), expected, atol=WITHIN, rtol=0)
    other = inference.generate(*arguments[:-1], -source)
    assert not torch.allclose(other, expected, atol=WITHIN)


@pytest.mark.slow
def test_what_a_decoder_runs_in_tiles_with_shared_norms_stays_in_torch(family, tmp_path) -> None:
    whole, tiled = family("autoencoder_kl"), family("autoencoder_kl", decode_voxels=64)
    expected = images(tiled, 2, batch=2)
    assert "network.decoder" in convert(whole, tmp_path, "onnx").networks
    (tmp_path / "tiled").mkdir()
    record = convert(tiled, tmp_path / "tiled", "onnx")
    assert "network.encoder" in record.networks
    blocks = tiled.network.decoder.blocks
    (start,) = (index for index, block in enumerate(blocks) if isinstance(block, Upsample))
    for index, block in enumerate(blocks):
        has_norm = any(isinstance(module, torch.nn.GroupNorm) for module in block.modules())
        if has_norm and index >= start:
            assert f"network.decoder.blocks.{index}" not in record.networks
    assert "network.decoder" not in record.networks
    torch.testing.assert_close(images(tiled, 2, batch=1), expected, atol=WITHIN, rtol=0)


@pytest.mark.parametrize(("weights", "largest"), [("float16", 5e-3), ("int8", 0.05)])
def test_smaller_weights_tell_how_far_off_they_are(weights, largest, family, tmp_path) -> None:
    exact, smaller = tmp_path / "exact", tmp_path / "smaller"
    exact.mkdir()
    smaller.mkdir()
    model = family("dcgan", latent_dim=32, channels=(16, 32))
    expected = images(model, 4, batch=4)
    convert(model, exact, "openvino")
    record = convert(
        family("dcgan", latent_dim=32, channels=(16, 32)), smaller, "openvino", weights
    )
    assert 1e-7 < record.largest_difference < largest
    told = json.loads((smaller / "openvino.json").read_text())
    assert told["largest_difference"] == record.largest_difference
    assert told["weights"] == weights
    size = {
        folder: (folder / "openvino.generator.bin").stat().st_size for folder in (exact, smaller)
    }
    assert size[smaller] < 0.6 * size[exact]
    again = family("dcgan", latent_dim=32, channels=(16, 32))
    substitute(again, smaller, "openvino")
    torch.testing.assert_close(images(again, 4, batch=2), expected, atol=2 * largest, rtol=0)


@pytest.mark.slow
def test_a_flow_with_weights_in_8_bits(family, tmp_path) -> None:
    model = family("rectified_flow", conditions=True, num_sampling_steps=2)
    expected = images(model, 2, batch=2)
    record = convert(model, tmp_path, "openvino", "int8")
    assert 1e-7 < record.largest_difference < 0.05
    torch.testing.assert_close(images(model, 2, batch=1), expected, atol=0.2, rtol=0)


def test_networks_that_make_other_images_are_refused(family, tmp_path, monkeypatch) -> None:
    from synthcube.sharing.runtimes import openvino

    called = openvino.Session.__call__

    def wrong(self, values):
        return [output + 0.01 for output in called(self, values)]

    monkeypatch.setattr(openvino.Session, "__call__", wrong)
    with pytest.raises(FamilyError, match=r"dcgan makes other images with openvino than with torch:"
                       r" they differ by 0\.00\d+ of the range, more than 0\.001"):  # fmt: skip
        convert(family("dcgan"), tmp_path, "openvino")


def test_a_network_that_torch_cannot_export_is_named(family, tmp_path) -> None:
    model = family("dcgan")
    forward = model.generator.forward
    model.generator.project.register_forward_pre_hook(
        lambda _, inputs: inputs[0].view(len(inputs[0]), -1)
    )
    model.generator.forward = forward
    del model.generator.forward
    with pytest.raises(FamilyError, match=r"generator cannot be converted, .* use x\.shape\[0\]"):
        convert(model, tmp_path, "onnx")


def test_weights_that_a_runtime_does_not_store(family, tmp_path) -> None:
    with pytest.raises(ConfigError, match="--runtime_weights int8: onnx takes float32"):
        convert(family("dcgan"), tmp_path, "onnx", "int8")


@pytest.mark.parametrize(
    ("runtime", "package"),
    [("openvino", "openvino"), ("onnx", "onnxruntime"), ("onnx", "onnxscript")],
)
def test_a_runtime_that_is_not_installed(runtime, package, family, tmp_path, monkeypatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"pip install 'synthcube\[{runtime}\]'"):
        convert(family("dcgan"), tmp_path, runtime)


@pytest.mark.slow
def test_plain_values_are_those_of_the_conversion(family, tmp_path) -> None:
    model = family("stylegan")
    convert(model, tmp_path, "openvino")
    model.grown[1] = 0.5  # as if it were still growing
    with pytest.raises(ArtifactError, match=r"generator was converted for \[1, 1\.0\] .*0\.5"):
        images(model, 1, batch=1)


def test_a_conversion_of_another_model(family, tmp_path) -> None:
    convert(family("dcgan"), tmp_path, "onnx")
    with pytest.raises(ArtifactError, match="the model has no generator; export it again"):
        substitute(family("vqvae"), tmp_path, "onnx")


def test_converting_is_quiet(family, tmp_path, capfd, caplog) -> None:
    caplog.set_level(logging.INFO, "synthcube")
    convert(family("dcgan"), tmp_path, "openvino", "int8")
    convert(family("dcgan"), tmp_path, "onnx")
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert "Converting generator for openvino." in caplog.messages


def test_handlers_of_others_keep_their_level(family, tmp_path) -> None:
    """NNCF's own way to be quiet silences every handler, also one that the root logger shares."""
    handler = logging.NullHandler(logging.INFO)
    logging.getLogger("nncf").addHandler(handler)
    try:
        convert(family("dcgan"), tmp_path, "openvino", "int8")
    finally:
        logging.getLogger("nncf").removeHandler(handler)
    assert handler.level == logging.INFO
