"""Conditional models from folder to folder: asked by class, by number, by table, by image."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image as Pillow

from synthcube.data.phantom import write_phantoms

FOLLOWS = ("--set", "data.conditions={Label: class, Brightness: number}")


def listed(folder: Path) -> list[dict[str, str]]:
    with (folder / "manifest.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def model(cli, tiny_config, phantoms: Path, tmp_path: Path) -> Path:
    run = tmp_path / "run"
    code, _, err = cli("train", "-c", tiny_config(), "-d", phantoms, "-o", run, *FOLLOWS)
    assert code == 0, err
    return run


def test_the_artifact_keeps_vocabulary_and_range(model: Path) -> None:
    image = json.loads((model / "artifact" / "image.json").read_text())
    label, brightness = image["conditions"]
    assert label["classes"] == ["disc", "square", "ring"]
    assert 170 <= brightness["low"] < brightness["high"] <= 240


@pytest.mark.slow
def test_what_was_followed_is_in_the_manifest(cli, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "images"
    code, _, err = cli("infer", "-m", model, "-o", out, "-n", 4, "--condition", "label=ring")
    assert code == 0, err
    rows = listed(out)
    assert [row["Label"] for row in rows] == ["ring"] * 4
    assert len({row["Brightness"] for row in rows}) == 4
    assert cli("check", "-c", tmp_path / "tiny.yaml", "-d", out, *FOLLOWS)[0] == 0


def test_so_many_of_each_class(cli, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "images"
    assert cli("infer", "-m", model, "-o", out, "-n", "ring=2,disc=1")[0] == 0
    assert [row["Label"] for row in listed(out)] == ["ring", "ring", "disc"]
    asked = tmp_path / "asked.yaml"
    asked.write_text("sampling:\n  num_images: {square: 2}\n")
    code, _, err = cli("infer", "-m", model, "-o", tmp_path / "y", "--parameters_file", asked)
    assert code == 0, err
    assert [row["Label"] for row in listed(tmp_path / "y")] == ["square", "square"]


def test_a_table_of_conditions(cli, model: Path, tmp_path: Path) -> None:
    table = tmp_path / "wanted.csv"
    brightness = json.loads((model / "artifact/image.json").read_text())["conditions"][1]
    table.write_text(f"Label,Brightness,Count\nring,{brightness['low']},2\ndisc,,1\n")
    assert cli("infer", "-m", model, "-o", tmp_path / "i", "--conditions", table)[0] == 0
    rows = listed(tmp_path / "i")
    assert [row["Label"] for row in rows] == ["ring", "ring", "disc"]
    assert float(rows[0]["Brightness"]) == pytest.approx(brightness["low"], rel=1e-4)
    assert rows[2]["Brightness"] == "", "left empty: not known"


def test_unknown_conditions_are_refused_before_anything_is_written(
    cli, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "images"
    code, _, err = cli(
        "infer", "-m", model, "-o", out, "--condition", "Label=cube", "--condition", "Age=3"
    )
    assert code == 2
    assert "Label=cube: 'cube' is not among the classes disc, square, ring" in err
    assert "Age: the model knows Label (disc, square, ring), Brightness (" in err
    assert not out.exists()


def test_a_model_without_conditions_refuses_them(
    cli, tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    assert cli("train", "-c", tiny_config(), "-d", phantoms, "-o", tmp_path / "run")[0] == 0
    code, _, err = cli(
        "infer", "-m", tmp_path / "run", "-o", tmp_path / "i", "--condition", "Label=ring"
    )
    assert code == 2
    assert "Label: the model knows no conditions" in err


@pytest.fixture
def translator(cli, tiny_config, tmp_path: Path):
    """A model that makes Channel_1 out of Channel_0, and its data."""

    def trained(*size: int) -> tuple[Path, Path]:
        spacing = (1, 2, 3)
        data = write_phantoms(
            tmp_path / "pairs", num=12, size=size, channels=2, spacing_mm=spacing
        ).parent
        code, _, err = cli(
            "train", "-c", tiny_config(), "-d", data, "-o", tmp_path / "run",
            "--set", "data.source_channels=[0]",
        )  # fmt: skip
        assert code == 0, err
        return tmp_path / "run", data

    return trained


def test_translation_writes_one_image_for_each_row_where_its_source_is(
    cli, translator, tmp_path: Path
) -> None:
    run, data = translator(16, 16, 16)
    out = tmp_path / "made"
    code, _, err = cli("infer", "-m", run, "-d", data, "-o", out)
    assert code == 0, err
    rows, sources = listed(out), listed(data)
    assert len(rows) == len(sources) == 12
    for row, source in zip(rows, sources, strict=True):
        assert row["SubjectID"] == source["SubjectID"]
        generated, known = nib.load(out / row["Channel_0"]), nib.load(data / source["Channel_0"])
        assert generated.shape == known.shape
        np.testing.assert_allclose(generated.affine, known.affine, atol=1e-4)


def test_a_run_knows_the_conditions_of_what_it_held_out(cli, tiny_config, tmp_path: Path) -> None:
    data = write_phantoms(tmp_path / "pairs", num=12, size=(16, 16), channels=2).parent
    run, out, results = tmp_path / "run", tmp_path / "made", tmp_path / "results.yaml"
    training = ("train", "-c", tiny_config(), "-d", data, "-o", run, *FOLLOWS,
                "--set", "data.source_channels=[0]")  # fmt: skip
    assert cli(*training)[0] == 0
    split = (run / "split.csv").read_text()
    with (run / "split.csv").open(newline="") as file:
        held_out = [row for row in csv.DictReader(file) if row["Split"] == "validation"]
    original = {row["SubjectID"]: row for row in listed(data)}
    for row in held_out:
        assert row["Brightness"] == original[row["SubjectID"]]["Brightness"]
    code, _, err = cli("infer", "-m", run, "-d", run, "-o", out)
    assert code == 0, err
    assert "of the 3 held-out images have numbers outside the range of the training" in err
    manifest = listed(out)
    assert [row["SubjectID"] for row in manifest] == [row["SubjectID"] for row in held_out]
    asked = [float(row["Brightness"]) for row in manifest]
    assert asked == pytest.approx([float(row["Brightness"]) for row in held_out], rel=1e-4)
    assert [row["Label"] for row in manifest] == [row["Label"] for row in held_out]
    (tmp_path / "light.yaml").write_text(
        "data: {source_channels: [0]}\nevaluation: {extractor: {name: radiomic}, num_repeats: 2}\n"
    )
    words = ("evaluate", "-p", out, "-l", run, "-m", run, "-c", tmp_path / "light.yaml")
    code, _, err = cli(*words, "-o", results)
    assert code == 0, err
    assert f"num_pairs: {len(held_out)}\n" in results.read_text()

    # An older version wrote no conditions.
    old = ["SubjectID", "Split", "Label", "Channel_0", "Channel_1"]
    with (run / "split.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, old, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(csv.DictReader(split.splitlines()))
    code, _, err = cli("infer", "-m", run, "-d", run, "-o", tmp_path / "again")
    assert code == 2
    assert "lacks the conditions of the model (Brightness)" in err
    assert not (tmp_path / "again").exists()
    assert cli(*training)[0] == 0, "an old run is continued"
    assert (run / "split.csv").read_text() == split


def test_translation_takes_the_source_alone(cli, translator, tmp_path: Path) -> None:
    run, data = translator(16, 16)
    alone = tmp_path / "alone.csv"
    rows = [f"{data / row['Channel_0']},{row['SubjectID']}" for row in listed(data)]
    alone.write_text("\n".join(["Channel_0,SubjectID", *rows]))
    assert cli("infer", "-m", run, "-d", data, "-o", tmp_path / "both")[0] == 0
    assert cli("infer", "-m", run, "-d", alone, "-o", tmp_path / "one")[0] == 0
    for both, one in zip(listed(tmp_path / "both"), listed(tmp_path / "one"), strict=True):
        pictures = [
            np.asarray(Pillow.open(tmp_path / name / row["Channel_0"]))
            for name, row in (("both", both), ("one", one))
        ]
        assert np.array_equal(*pictures)


def test_translation_needs_images_and_the_right_channels(
    cli, translator, phantoms: Path, tmp_path: Path
) -> None:
    run, _ = translator(16, 16)
    code, _, err = cli("infer", "-m", run, "-o", tmp_path / "i")
    assert code == 2
    assert "makes images out of others (channels [0] of its data): give them as data_path" in err
    three = write_phantoms(tmp_path / "three", num=3, size=(16, 16), channels=3).parent
    code, _, err = cli("infer", "-m", run, "-d", three, "-o", tmp_path / "i")
    assert code == 2
    assert "the images have 3 channel(s); the model makes 1 out of 1" in err


@pytest.mark.parametrize("channels", ["[2]", "[0, 1]"])
def test_source_channels_that_leave_nothing_or_are_not_there(
    cli, channels: str, tiny_config, tmp_path: Path
) -> None:
    data = write_phantoms(tmp_path / "pairs", num=6, size=(16, 16), channels=2).parent
    code, _, err = cli(
        "train", "-c", tiny_config(), "-d", data, "-o", tmp_path / "run",
        "--set", f"data.source_channels={channels}",
    )  # fmt: skip
    assert code == 2
    assert f"data.source_channels {channels}: the images have 2 channel(s)" in err


LEARNS = """
model: {{name: {family}, channels: [16, 32], num_res_blocks: 1, attention_from: 1,
  num_norm_groups: 4, guidance: {guidance:.1f}, optimizer: {{lr: 2.0e-3}}}}
training: {{max_epochs: {epochs}, batch_size: 24, validate_every_n_epochs: 20,
  sample_every_n_epochs: 0, ema: {{decay: 0.98}}}}
compute: {{accelerator: cpu, precision: "32"}}
data: {data}
"""


def pictures(folder: Path) -> np.ndarray:
    """(N, X, Y) in the order of the manifest."""
    paths = [folder / row["Channel_0"] for row in listed(folder)]
    return np.stack([np.asarray(Pillow.open(path), dtype=float) for path in paths])


def shape_of(picture: np.ndarray) -> tuple[str, float, float]:
    """Kind, radius and brightness of the bright shape in a picture, measured."""
    x, y = np.nonzero(picture > 100)
    if len(x) == 0:
        return "none", 0.0, 0.0
    sides = np.ptp(x) + 1, np.ptp(y) + 1
    centre = picture[round(x.mean()), round(y.mean())]
    kind = "square" if len(x) > 0.9 * sides[0] * sides[1] else "disc"
    return "ring" if centre < 100 else kind, max(sides) / 2, picture[x, y].mean()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "epochs", "guidance"), [("rectified_flow", 120, 1.0), ("ddpm", 90, 2.0)]
)
def test_images_are_what_was_asked_for(
    cli, family: str, epochs: int, guidance: float, tmp_path: Path
) -> None:
    """After half a minute of training: class, size and brightness follow."""
    data = write_phantoms(tmp_path / "data", num=240, size=(16, 16)).parent
    (tmp_path / "c.yaml").write_text(LEARNS.format(
        family=family, epochs=epochs, guidance=guidance,
        data="{conditions: {Label: class, Radius: number, Brightness: number}}",
    ))  # fmt: skip
    run, out = tmp_path / "run", tmp_path / "images"
    assert cli("train", "-c", tmp_path / "c.yaml", "-d", data, "-o", run)[0] == 0
    assert cli("infer", "-m", run, "-o", out, "-n", 60)[0] == 0
    follow_what_was_asked(out)


# The first stage, the second, and images and epochs of both.
TWO_STAGES = {
    "latent_diffusion": (
        "{name: autoencoder_kl, channels: [16, 32], num_norm_groups: 4, optimizer: {lr: 2.0e-3}}",
        "channels: [32, 64], num_res_blocks: 1, attention_from: 1, num_norm_groups: 4",
        (240, 40, 90),
    ),
    "code_prior": (
        "{name: vqvae, channels: [32], num_res_layers: 1, num_embeddings: 32, embedding_dim: 8,"
        " optimizer: {lr: 2.0e-3}}",
        "dim: 64, num_layers: 3, num_heads: 4, dropout: 0.2",
        (400, 80, 70),
    ),
}
STAGE = """
model: {model}
training: {{max_epochs: {epochs}, batch_size: 24, validate_every_n_epochs: 10,
  sample_every_n_epochs: 0, ema: {{decay: 0.98}}}}
compute: {{accelerator: cpu, precision: "32"}}
data: {{conditions: {{Label: class, Radius: number, Brightness: number}}}}
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", TWO_STAGES)
def test_images_of_two_stages_are_what_was_asked_for(cli, family: str, tmp_path: Path) -> None:
    """After a minute for both stages."""
    first, second, (num, *epochs) = TWO_STAGES[family]
    data = write_phantoms(tmp_path / "data", num=num, size=(16, 16)).parent
    second = (f"{{name: {family}, first_stage: {tmp_path / 'first'}, optimizer: {{lr: 2.0e-3}}, "
              f"guidance: 1.5, {second}}}")  # fmt: skip
    for run, model, length in zip(("first", "second"), (first, second), epochs, strict=True):
        (tmp_path / f"{run}.yaml").write_text(STAGE.format(model=model, epochs=length))
        code, _, err = cli("train", "-c", tmp_path / f"{run}.yaml", "-d", data,
                           "-o", tmp_path / run)  # fmt: skip
        assert code == 0, err
    assert cli("infer", "-m", tmp_path / "second", "-o", tmp_path / "images", "-n", 60)[0] == 0
    follow_what_was_asked(tmp_path / "images")


def follow_what_was_asked(out: Path) -> None:
    """Of images of every condition: class, size and brightness are those in the manifest."""
    measured = [shape_of(picture) for picture in pictures(out)]
    asked = listed(out)
    kinds = [kind == row["Label"] for (kind, _, _), row in zip(measured, asked, strict=True)]
    assert np.mean(kinds) > 0.6, "a third by chance"
    for place, column in ((1, "Radius"), (2, "Brightness")):
        pairs = [(radius[place], float(row[column]))
                 for radius, row in zip(measured, asked, strict=True)]  # fmt: skip
        assert np.corrcoef(np.transpose(pairs))[0, 1] > 0.7, column


@pytest.mark.slow
@pytest.mark.parametrize("keys", [(), ("start=source",), ("mode=regression",)])
def test_a_translation_shows_what_its_source_does(
    cli, tmp_path: Path, keys: tuple[str, ...]
) -> None:
    """Channel 1 of a phantom is its channel 0 with dark and bright exchanged."""
    data = write_phantoms(tmp_path / "data", num=120, size=(16, 16), channels=2).parent
    (tmp_path / "c.yaml").write_text(
        LEARNS.format(family="rectified_flow", epochs=40, guidance=1, data="{source_channels: [0]}")
    )
    run, out = tmp_path / "run", tmp_path / "images"
    words = [word for key in keys for word in ("--set", f"model.{key}")]
    assert cli("train", "-c", tmp_path / "c.yaml", "-d", data, "-o", run, *words)[0] == 0
    new = write_phantoms(tmp_path / "new", num=12, size=(16, 16), channels=2, seed=9).parent
    assert cli("infer", "-m", run, "-d", new, "-o", out)[0] == 0
    truths = [np.asarray(Pillow.open(new / row["Channel_1"])) for row in listed(new)]
    for picture, truth in zip(pictures(out), truths, strict=True):
        assert np.corrcoef(picture.ravel(), truth.ravel())[0, 1] > 0.8
