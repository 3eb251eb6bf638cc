"""The YAML: what is read, what is refused, and what the refusal says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from synthcube import config, reading
from synthcube.errors import ConfigError
from synthcube.models import registry
from synthcube.tasks.describe import starting_yaml


@pytest.fixture
def write(tmp_path: Path):
    def _write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return _write


def faults(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError, match="fault") as caught:
        config.load(path, overrides)
    return list(caught.value.faults)


def test_nothing_said_is_the_default_family(write) -> None:
    settings = config.load(write(""))
    assert settings.model.name == "rectified_flow"
    assert settings.training.ema is not None


def test_precedence_is_defaults_yaml_set(write) -> None:
    path = write("seed: 3\ntraining: {batch_size: 4}\n")
    settings = config.load(path, ["training.batch_size=8", "model.channels=[32, 64]"])
    assert (settings.seed, settings.training.batch_size) == (3, 8)
    assert settings.model.model_dump()["channels"] == (32, 64)


def test_numbers_are_read_as_people_write_them(write) -> None:
    settings = config.load(write("model: {optimizer: {lr: 1e-4}}"))
    assert settings.model.optimizer.lr == 1e-4


def test_no_and_on_are_words_not_truths() -> None:
    assert reading.parse("[no, on, yes, 2020-01-01]", "x")[0] == [
        "no", "on", "yes", "2020-01-01",
    ]  # fmt: skip


def test_unknown_keys_name_the_nearest_right_one_and_the_line(write) -> None:
    path = write("training:\n  batch_sise: 4\nmodel:\n  chnnels: [8]\n")
    assert faults(path) == [
        "model.chnnels (line 4): unknown key; did you mean channels?",
        "training.batch_sise (line 2): unknown key; did you mean batch_size?",
    ]


def test_every_fault_is_reported_at_once(write) -> None:
    told = faults(
        write(
            "seed: -1\n"
            "model: {optimizer: {name: AdamWW}, sampler: magic}\n"
            "training: {batch_size: '16', max_epochs: 1.5, ema: {decay: 2}}\n"
            "compute: {precision: '12', strategy: dpp, num_devices: 0}\n"
        )
    )
    text = "\n".join(told)
    assert len(told) == 9
    assert "seed (line 1): should be greater than or equal to 0, not -1" in text
    assert "unknown optimizer 'AdamWW'; did you mean AdamW?" in text
    assert "training.batch_size (line 3): should be a valid integer, not '16'" in text
    assert "training.max_epochs (line 3): should be a valid integer" in text
    assert (
        "model.sampler (line 2): should be 'dpm-solver++', 'euler' or 'heun', not 'magic'" in text
    )
    assert "compute.num_devices" in text


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ("optimizer: {beta: 1}", "AdamW takes no argument 'beta'; it takes betas"),
        ("scheduler: {name: StepLR, gama: 1}", "StepLR takes no argument 'gama'"),
        ("scheduler: {name: cosinus}", "unknown schedule 'cosinus'; did you mean cosine"),
        ("scheduler: {name: cosine, gamma: 1}", "cosine takes warmup_steps only, not 'gamma'"),
        ("name: ddmp", "There is no family 'ddmp'; did you mean ddpm?"),
        ("name: 'nowhere.at_all:Config'", "nowhere.at_all:Config is code that does not"),
        ("name: 'json:dumps'", "json:dumps cannot be used: what belongs to Python"),
    ],
)
def test_names_and_arguments_are_checked_at_start(write, section: str, expected: str) -> None:
    assert expected in "\n".join(faults(write(f"model: {{{section}}}")))


def test_transforms_are_checked_at_start(write) -> None:
    told = faults(
        write(
            "data:\n"
            "  preprocessing: [{name: CropOrPadd}]\n"
            "  augmentation: [{name: RandomFlip, axis: 0}]\n"
            "  percentiles: [99, 1]\n"
        )
    )
    assert "torchio has no transform 'CropOrPadd'; did you mean CropOrPad" in told[0]
    assert "RandomFlip does not take these arguments" in told[1]


def test_other_faults_are_found_beside_an_unknown_family(write) -> None:
    told = faults(write("model: {name: gan}\ntraining: {batch_size: 0}\n"))
    assert "There is no family 'gan'" in told[0]
    assert "training.batch_size" in told[1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: !!python/object/apply:os.system [ls]", r"line 1: tags .* are not allowed"),
        ("a: &x [1]\nb: *x", r"line 1: anchors and aliases"),
        ("a: &a [z]\n" + "".join(f"b{i}: &b{i} [*a,*a]\n" for i in range(9)), "anchors"),
        ("seed: 1\nseed: 2", r"line 2: the key 'seed' is there twice"),
        ("seed: [1", r"line \d: this is not YAML"),
        ("[" * 50 + "]" * 50, "nested more than 20 deep"),
        ("- 1", "a mapping of sections is needed, not list"),
        ("x" * (1 << 21), "characters are too many"),
    ],
    ids=["tag", "anchor", "bomb", "twice", "syntax", "depth", "list", "size"],
)
def test_yaml_is_data_only(write, text: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        config.load(write(text))


def test_missing_and_binary_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml: No such file"):
        config.load(tmp_path / "nothing.yaml")
    (tmp_path / "image.yaml").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ConfigError, match="not a text file"):
        config.load(tmp_path / "image.yaml")


@pytest.mark.parametrize("override", ["seed", "=3", "a..b=1"])
def test_malformed_overrides_show_the_form(write, override: str) -> None:
    with pytest.raises(ConfigError, match="write it as key=value"):
        config.load(write(""), [override])


def test_the_resolved_config_loads_equal(write) -> None:
    settings = config.load(write("model: {name: vqvae, channels: [8]}"))
    again = config.load(write(yaml.safe_dump(settings.dump())))
    assert again == settings


@pytest.mark.parametrize("family", registry.names())
@pytest.mark.parametrize("dims", [2, 3])
def test_init_prints_a_valid_commented_yaml(write, family: str, dims: int) -> None:
    text = starting_yaml(family, dims)
    settings = config.load(write(text))
    assert settings.model == registry.find(family)()
    assert len(settings.data.size or ()) == dims
    for line in text.splitlines():
        assert len(line) <= 110


def test_schema_describes_every_family() -> None:
    schema = config.json_schema()
    names = {choice["$ref"].rpartition("/")[2] for choice in schema["properties"]["model"]["anyOf"]}
    assert {"RectifiedFlowConfig", "DDPMConfig", "VQVAEConfig"} <= names
    json.dumps(schema)
    for reference in names:
        assert reference in schema["$defs"]
