"""A stranger's model or YAML runs no code: only who runs a command vouches for what it names.

Whatever is refused here would, if it were imported or called, leave a file: the canary.
"""

from __future__ import annotations

import inspect
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError

import synthcube
from synthcube import config, plugins
from synthcube.data.phantom import write_phantoms
from synthcube.data.postprocessing import FinishingTransform, _monai_transforms
from synthcube.data.preprocessing import DataConfig
from synthcube.data.transforms import ALIASES, TransformConfig, alias, torchio_transforms
from synthcube.errors import ArtifactError, ConfigError
from synthcube.models import artifact, optimizers
from synthcube.models.losses import LossConfig, known_losses
from synthcube.models.optimizers import OptimizerConfig, SchedulerConfig

SENTENCE = (
    "is code that does not belong to SynthCube. If you trust it, name its package with --trust"
)
EXAMPLES = Path(__file__).parents[1] / "examples" / "plugins"

CANARY = """
from pathlib import Path
Path({path!r}).touch()
class Payload:
    def __init__(self, *args, **kwargs):
        Path({path!r}).touch()
    def __call__(self, *args):
        return args[0]
"""


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file that no code may leave; the module canary_xyz would, and can be imported."""
    folder, path = tmp_path / "importable", tmp_path / "canary"
    folder.mkdir()
    (folder / "canary_xyz.py").write_text(CANARY.format(path=str(path)))
    monkeypatch.syspath_prepend(folder)
    monkeypatch.chdir(folder)
    yield path
    assert "canary_xyz" not in sys.modules
    assert not path.exists()


def popen(canary: Path) -> dict[str, Any]:
    """A step that MONAI would take for the name of a class to import and call."""
    return {
        "name": "monai.transforms:LoadImage",
        "reader": "subprocess.Popen",
        "args": ["sh", "-c", f"touch {canary}"],
    }


Forge = Callable[..., Path]


@pytest.fixture
def forge(first_stage, tmp_path: Path) -> Forge:
    """Changes the config of a trained model, and makes the hashes match."""

    def forged(key: str, value: Any, family: str = "rectified_flow") -> Path:
        folder = tmp_path / "stranger" / key
        shutil.copytree(first_stage(family) / "artifact", folder)
        settings = yaml.safe_load((folder / "config.yaml").read_text())
        *sections, last = key.split(".")
        section = settings
        for name in sections:
            section = section[name]
        section[last] = value
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
        artifact.write_index(folder)
        return folder

    return forged


NEEDED = {
    "model.name": lambda canary: "canary_xyz:Payload",
    "data.preprocessing": lambda canary: [{"name": "canary_xyz:Payload"}],
    "sampling.postprocessing": lambda canary: [popen(canary)],
}
NAMES = {"model.name": "canary_xyz:Payload", "data.preprocessing": "canary_xyz:Payload",
         "sampling.postprocessing": "monai.transforms:LoadImage"}  # fmt: skip


def commands(model: Path, data: Path, out: Path) -> dict[str, list[Any]]:
    """Every command that takes a model."""
    start = out.with_suffix(".yaml")
    start.write_text(f"training: {{start_from: {model}}}\n")
    site = out.with_name("additional_files")
    site.mkdir()
    shutil.copytree(model, site / "model")
    return {
        "infer": ["infer", "-m", model, "-o", out, "-n", 1],
        "infer -d": ["infer", "-m", model, "-o", out, "-d", data],
        "evaluate -m": ["evaluate", "-p", data, "-l", data, "-m", model, "-o", out],
        "export": ["export", "-m", model, "-o", out],
        "package": ["package", "-m", model, "-o", out],
        "medperf infer": [
            "medperf", "infer", "--data_path", data, "--output_path", out,
            "--additional_files", site,
        ],
        "train from": ["train", "-c", start, "-d", data, "-o", out],
        "check from": ["check", "-c", start, "-d", data],
    }  # fmt: skip


@pytest.mark.parametrize("key", NEEDED)
def test_a_strangers_model_is_refused_by_every_command(
    key: str, forge: Forge, canary: Path, cli, phantoms: Path, tmp_path: Path
) -> None:
    model = forge(key, NEEDED[key](canary))
    for title, words in commands(model, phantoms, tmp_path / "out").items():
        code, _, err = cli(*words)
        assert code == 2, (title, err)
        assert f"{NAMES[key]} {SENTENCE}" in err, title
        assert key in err, title
        assert "Traceback" not in err
    with pytest.raises(ArtifactError, match=f"{NAMES[key]} {SENTENCE}"):
        synthcube.from_pretrained(model)


def test_all_that_a_model_needs_is_said_at_once(forge: Forge, canary: Path, cli, tmp_path) -> None:
    model = forge("model.name", "their_flow.flow:Config")
    settings = yaml.safe_load((model / "config.yaml").read_text())
    settings["data"]["preprocessing"] = [{"name": "Clamp"}, {"name": "their_steps:Step"}]
    settings["sampling"]["postprocessing"] = [{"name": "canary_xyz:Payload"}]
    (model / "config.yaml").write_text(yaml.safe_dump(settings))
    artifact.write_index(model)
    code, _, err = cli("infer", "-m", model, "-o", tmp_path / "out")
    assert code == 2
    assert f"model.name: their_flow.flow:Config {SENTENCE} their_flow," in err
    assert f"data.preprocessing.1.name: their_steps:Step {SENTENCE} their_steps," in err
    assert f"sampling.postprocessing.0.name: canary_xyz:Payload {SENTENCE} canary_xyz," in err
    assert not (tmp_path / "out").exists()


ONLY_TRAINS = {
    "data.augmentation": [{"name": "canary_xyz:Payload"}, {"name": "Lambda", "function": "x"}],
    "model.optimizer": {"name": "canary_xyz:Payload", "lr": 1.0},
    "model.scheduler": {"name": "canary_xyz:Payload"},
    "model.losses": [{"name": "canary_xyz:Payload"}],
    "training.loggers": [{"name": "wandb", "arguments": {"dir": "canary_xyz"}}],
}


@pytest.mark.parametrize("key", ONLY_TRAINS)
def test_what_only_trains_is_not_even_looked_up(
    key: str, forge: Forge, canary: Path, cli, phantoms: Path, tmp_path: Path
) -> None:
    model = forge(key, ONLY_TRAINS[key])
    code, _, err = cli("infer", "-m", model, "-o", tmp_path / "out", "-n", 1)
    assert code == 0, err
    assert cli("export", "-m", model, "-o", tmp_path / "shared")[0] == 0
    code, _, err = cli(
        "evaluate", "-p", tmp_path / "out", "-l", phantoms, "-t", phantoms, "-m", model,
        "-o", tmp_path / "results.yaml",
    )  # fmt: skip
    assert code == 2, "one image is too few"
    # How well a model knows an image is told by its loss, which is needed for nothing else.
    assert (f"model.losses.0.name: canary_xyz:Payload {SENTENCE}" in err) is (key == "model.losses")


def test_a_first_stage_in_a_model_is_refused(forge: Forge, canary: Path, cli, tmp_path) -> None:
    section = {"name": "vqvae", "first_stage_config": {"name": "canary_xyz:Payload"}}
    model = forge("model.first_stage_config", section)
    code, _, err = cli("infer", "-m", model, "-o", tmp_path / "out", "-n", 1)
    assert code == 2
    assert f"first_stage_config.first_stage_config.name: canary_xyz:Payload {SENTENCE}" in err


def test_a_strangers_first_stage_is_refused(
    forge: Forge, canary: Path, cli, tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    path = tiny_config("code_prior")
    stage = forge("model.name", "canary_xyz:Payload", "vqvae")
    for words in (["train", "-o", tmp_path / "out"], ["check"]):
        code, _, err = cli(
            *words, "-c", path, "-d", phantoms, "--set", f"model.first_stage={stage}"
        )
        assert code == 2
        assert SENTENCE in err


IN_YAML = {
    "model": {"name": "canary_xyz:Payload"},
    "model ": {"losses": [{"name": "monai.losses:PerceptualLoss"}]},
    "model  ": {"optimizer": {"name": "canary_xyz:Payload"}},
    "model   ": {"scheduler": {"name": "canary_xyz:Payload"}},
    "data": {"preprocessing": [{"name": "canary_xyz:Payload"}], "size": [16, 16]},
    "data ": {"augmentation": [{"name": "canary_xyz:Payload"}], "size": [16, 16]},
    "sampling": {"postprocessing": [{"name": "canary_xyz:Payload"}]},
}


@pytest.mark.parametrize("section", IN_YAML)
def test_a_strangers_yaml_is_refused(
    section: str, canary: Path, cli, phantoms: Path, tmp_path: Path
) -> None:
    path, weights = tmp_path / "run.yaml", tmp_path / "weights.pt"
    path.write_text(yaml.safe_dump({section.strip(): IN_YAML[section]}))
    torch.save({}, weights)
    calls = [
        ["train", "-c", path, "-d", phantoms, "-o", tmp_path / "out"],
        ["train", "-c", path, "-d", phantoms, "-o", tmp_path / "out", "--debug"],
        ["check", "-c", path, "-d", phantoms],
    ]
    if section.strip() != "model":
        calls.append(["import", weights, "--family", "ddpm", "-c", path, "-o", tmp_path / "out"])
    for words in calls:
        code, _, err = cli(*words)
        assert code == 2, words
        assert SENTENCE in err, words


def test_parameters_of_an_inference_and_of_a_container_are_refused(
    canary: Path, cli, first_stage, phantoms: Path, tmp_path: Path
) -> None:
    model, out = first_stage("rectified_flow"), tmp_path / "out"
    steps, preparing = tmp_path / "steps.yaml", tmp_path / "preparing.yaml"
    steps.write_text(yaml.safe_dump({"sampling": {"postprocessing": [popen(canary)]}}))
    preparing.write_text(yaml.safe_dump({"data": {"preprocessing": [popen(canary)]}}))
    both = ["--data_path", phantoms, "--labels_path", phantoms, "--parameters_file", preparing]
    judged = ["--predictions", phantoms, "--labels", phantoms, "--parameters_file", preparing]
    outputs = ["--output_path", out, "--output_labels_path", tmp_path / "labels"]
    for words in (
        ["infer", "-m", model, "-o", out, "-n", 1, "-c", steps],
        ["medperf", "infer", "--data_path", phantoms, "--output_path", out,
         "--additional_files", model / "artifact", "--parameters_file", steps],
        ["medperf", "prepare", *both, *outputs],
        ["medperf", "sanity_check", *both],
        ["medperf", "statistics", *both, "--output_path", out],
        ["medperf", "evaluate", *judged, "--output_path", out],
        ["evaluate", "-p", phantoms, "-l", phantoms, "-c", preparing, "-o", out],
    ):  # fmt: skip
        code, _, err = cli(*words)
        assert code == 2, words
        assert f"monai.transforms:LoadImage {SENTENCE} monai" in err, words


# -- who vouches -------------------------------------------------------------------------------


def own_model(folder: Path) -> Path:
    """A trained model of the family in examples/plugins, with its transform."""
    names = {"model": {"name": "my_autoencoder:MyAutoencoderConfig", "num_features": 2},
             "data": {"preprocessing": [{"name": "my_transforms:SquareRoot"}], "size": [16, 16],
                      "intensity_range": [0, 16]},
             "sampling": {"postprocessing": [{"name": "my_transforms:SquareRoot"}]}}  # fmt: skip
    from synthcube.schema import ImageSpec

    image = ImageSpec(
        size=(16, 16), channels=1, spacing_mm=(1.0, 1.0, 1.0), intensity_range=((0.0, 16.0),),
        affine=((1.0, 0, 0, 0), (0, 1.0, 0, 0), (0, 0, 1.0, 0), (0, 0, 0, 1.0)), file_format="png",
    )  # fmt: skip
    with plugins.vouching([EXAMPLES]):
        settings = config.build(names)
        weights = settings.model.build(image).state_dict()
    artifact.save(folder, config=settings.dump(), image=image, weights=weights, metrics={})
    return folder


def test_who_opens_a_model_vouches_for_this_one_alone(tmp_path: Path) -> None:
    model = own_model(tmp_path / "model")
    data = write_phantoms(tmp_path / "data", num=2, size=(16, 16)).parent
    opened = synthcube.from_pretrained(model, plugins=[EXAMPLES])
    with pytest.raises(ArtifactError, match=SENTENCE):
        synthcube.from_pretrained(model)
    images = opened.reconstruct(data)
    assert len(images.save(tmp_path / "images")) == 2
    with pytest.raises(ValidationError, match="SquareRoot is code that does not belong"):
        DataConfig(preprocessing=[{"name": "my_transforms:SquareRoot"}])


def test_a_package_is_named_by_who_runs_the_command(
    cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = own_model(tmp_path / "model")
    data = write_phantoms(tmp_path / "data", num=2, size=(16, 16)).parent
    monkeypatch.syspath_prepend(EXAMPLES)  # installed
    words = ["infer", "-m", model, "-d", data, "-o", tmp_path / "out"]
    with plugins.vouching():
        code, _, err = cli(*words, "--trust", "my_autoencoder")
        assert code == 2
        assert "my_transforms:SquareRoot" in err
        assert "my_autoencoder:" not in err
        code, _, err = cli(*words, "--trust", "my_autoencoder", "--trust", "my_transforms")
        assert code == 0, err
    assert cli(*words)[0] == 2, "an earlier command vouches for nothing"


def test_neither_the_environment_nor_the_model_vouches(
    forge: Forge, canary: Path, cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = forge("model.name", "canary_xyz:Payload")
    for name in ("SYNTHCUBE_TRUST", "SYNTHCUBE_PLUGINS", "PYTHONPATH"):
        monkeypatch.setenv(name, str(tmp_path / "importable"))
    settings = yaml.safe_load((model / "config.yaml").read_text())
    settings["trust"] = settings["model"]["trust"] = ["canary_xyz"]
    (model / "config.yaml").write_text(yaml.safe_dump(settings))
    artifact.write_index(model)
    assert cli("infer", "-m", model, "-o", tmp_path / "out", "-n", 1)[0] == 2


def test_a_vouched_folder_opens_nothing_else(canary: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "mine_xyz.py").write_text(
        "from subprocess import Popen\nfrom monai.transforms import LoadImage\n"
        "import subprocess\nclass Step:\n    def __call__(self, x):\n        return x\n"
    )
    for taken in ("monai", "canary_xyz"):
        (folder / f"{taken}.py").write_text("class LoadImage: pass\nclass Payload: pass\n")
    (folder / "__main__.py").write_text("class Step: pass\n")
    plugins.vouch([folder])
    assert plugins.load("mine_xyz:Step")
    for name, message in {
        "mine_xyz:Popen": "mine_xyz:Popen is subprocess:Popen. subprocess:Popen cannot be used",
        "mine_xyz:LoadImage": "mine_xyz:LoadImage is monai.transforms.io.array:LoadImage. monai",
        "mine_xyz:subprocess": "mine_xyz:subprocess is :subprocess",
        "monai:LoadImage": "Python has another module monai than the one in the folder",
        "canary_xyz:Payload": "Python has another module canary_xyz than",
        "subprocess:Popen": "what belongs to Python or to SynthCube is not reached in this way",
        "__main__:Step": "what belongs to Python or to SynthCube",
        "synthcube.storage:write_text": "what belongs to Python or to SynthCube",
        "..mine_xyz:Step": SENTENCE,
        ":Step": SENTENCE,
        "/etc/passwd:x": SENTENCE,
    }.items():
        with pytest.raises(ConfigError) as caught:
            plugins.load(name)
        assert message in str(caught.value), name
    assert sys.modules["monai"].__file__ != str(folder / "monai.py")


def test_what_cannot_be_vouched_for(tmp_path: Path) -> None:
    for words, message in (
        ((["nowhere"], []), "--plugins nowhere: there is no such folder"),
        (([], ["os"]), "--trust os: what belongs to Python or to SynthCube"),
        (([], ["synthcube"]), "--trust synthcube: what belongs"),
        (([], ["my_pkg.flow"]), "--trust my_pkg.flow: the name of a package is needed"),
    ):
        with pytest.raises(ConfigError, match=message):
            plugins.vouch(*words)
    assert plugins.vouched() == plugins.Vouched()


@pytest.mark.slow
def test_the_current_folder_takes_the_place_of_nothing(canary: Path, tmp_path: Path) -> None:
    for name in ("yaml", "pydantic", "monai", "torchio", "typer"):
        shutil.copy(tmp_path / "importable" / "canary_xyz.py", f"{name}.py")
    done = subprocess.run(
        [sys.executable, "-m", "synthcube", "families"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "rectified_flow" in done.stdout


@pytest.mark.slow
def test_processes_of_an_inference_know_what_is_vouched_for(
    canary: Path, cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    if sys.version_info >= (3, 11):  # older ones start every process in the current folder
        for name in ("pickle", "socket", "tempfile"):
            shutil.copy(tmp_path / "importable" / "canary_xyz.py", f"{name}.py")
    model = own_model(tmp_path / "model")
    data = write_phantoms(tmp_path / "data", num=4, size=(16, 16)).parent
    settings = tmp_path / "two.yaml"
    settings.write_text("compute: {num_devices: 2, accelerator: cpu}\nsampling: {batch_size: 2}\n")
    code, _, err = cli(
        "infer", "-m", model, "-d", data, "-o", tmp_path / "out", "-c", settings,
        "--plugins", EXAMPLES,
    )  # fmt: skip
    assert code == 0, err
    assert "2 x cpu" in err


# -- the tables --------------------------------------------------------------------------------

HOSTILE: list[Any] = [
    "canary_xyz:Payload",
    "canary_xyz.Payload",
    "subprocess.Popen",
    "lambda x: __import__('canary_xyz')",
    "canary.npy",
    "https://localhost/canary",
]
HOSTILE += [["subprocess.Popen"], [[1, "canary_xyz"]], {"a": "canary_xyz.Payload"}, b"canary_xyz"]


def parameters(kind: Any) -> list[str]:
    """Of a class and, where it hands further ones on, of those that it extends."""
    starts = [vars(base).get("__init__") for base in getattr(kind, "__mro__", ())]
    functions = [start for start in starts if inspect.isfunction(start)] or [kind]
    names = [name for function in functions for name in inspect.signature(function).parameters]
    return [name for name in dict.fromkeys(names) if name not in ("self", "lr", "name", "weight")]


def table() -> dict[str, tuple[type, Any]]:
    """Every name that a YAML may have, with its section and class."""
    finishing = {**torchio_transforms(), **_monai_transforms()}
    schedules = optimizers.known_schedules().items()
    keys: dict[str, tuple[type, Any]] = {}
    for section, kinds in (
        (LossConfig, known_losses()),
        (OptimizerConfig, optimizers.known_optimizers()),
        (SchedulerConfig, {name: kind for name, kind in schedules if kind}),
        (TransformConfig, torchio_transforms() | {name: alias(name) for name in ALIASES}),
        (FinishingTransform, finishing),
    ):
        keys |= {f"{section.__name__}-{name}": (section, kind) for name, kind in kinds.items()}
    return keys


@pytest.mark.parametrize("entry", table())
def test_no_argument_of_a_named_class_is_more_than_data(entry: str, canary: Path) -> None:
    section, kind = table()[entry]
    name = entry.partition("-")[2]
    needed = {
        argument.name: 1
        for argument in inspect.signature(kind).parameters.values()
        if argument.default is argument.empty and argument.kind is argument.POSITIONAL_OR_KEYWORD
        and argument.name not in ("optimizer", "params", "lr")
    }  # fmt: skip
    for argument in (*parameters(kind), "class_weights", "reader", "anything"):
        for value in HOSTILE:
            with pytest.raises(ValidationError, match=r"it takes |takes no argument "):
                section(**{"name": name, **needed, argument: value})
    assert "canary_xyz" not in sys.modules
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["canary_xyz.py"]


@pytest.mark.parametrize("entry", table())
def test_every_word_that_is_a_default_may_be_written_down(entry: str) -> None:
    _, kind = table()[entry]
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(kind).parameters.items()
        if isinstance(parameter.default, str)
    }
    assert (
        list(plugins.argument_faults({name: str(value) for name, value in defaults.items()})) == []
    )


def test_words_are_those_that_torchio_knows() -> None:
    for name, argument, others in (
        ("Resize", "image_interpolation", {"target_shape": 8}),
        ("Pad", "padding_mode", {"padding": 1}),
        ("RandomAffine", "default_pad_value", {}),
        ("RandomAffine", "center", {}),
        ("ToOrientation", "orientation", {}),
        ("EnsureShapeMultiple", "method", {"target_multiple": 4}),
        ("CropOrPad", "units", {"target_shape": 8}),
        ("CropOrPad", "location", {"target_shape": 8}),
        ("RandomFlip", "axes", {}),
    ):
        for word in plugins.WORDS[argument]:
            exact = word.title() if argument == "axes" else word
            spelt = exact.upper() if argument == "orientation" else exact
            TransformConfig(name=name, **{argument: spelt}, **others)
        with pytest.raises(ValidationError, match=f"{argument} is 'xyz': it takes "):
            TransformConfig(name=name, **{argument: "xyz"}, **others)


def test_landmarks_are_numbers_and_no_file(tmp_path: Path) -> None:
    torch.save({"default_image_name": [0, 1]}, tmp_path / "landmarks.pt")
    for value in (str(tmp_path / "landmarks.pt"), {"default_image_name": "landmarks.npy"}):
        with pytest.raises(ValidationError, match=r"landmarks .*: it takes numbers"):
            TransformConfig(name="HistogramStandardization", landmarks=value)
    marks = [*range(0, 101, 10), 110, 120]
    transform = TransformConfig(name="HistogramStandardization", landmarks=marks).build()
    image = torch.rand(1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    import torchio as tio

    assert float(transform(tio.ScalarImage(tensor=image)).data.max()) > 50


def test_what_torchio_has_and_a_yaml_cannot_name_is_listed() -> None:
    """A transform of a newer TorchIO is looked at before it gets a name."""
    import torchio as tio

    from synthcube.data.transforms import UNUSABLE_TRANSFORMS

    kinds = {
        name
        for name, kind in vars(tio).items()
        if inspect.isclass(kind) and issubclass(kind, tio.Transform) and name != "Transform"
        and not inspect.isabstract(kind)
    }  # fmt: skip
    assert kinds - set(torchio_transforms()) <= set(UNUSABLE_TRANSFORMS)


def test_hostile_arguments_in_a_model_are_refused(
    forge: Forge, canary: Path, cli, phantoms: Path, tmp_path: Path
) -> None:
    model = forge("sampling.postprocessing", [{"name": "MedianSmooth", "radius": "canary_xyz.A"}])
    code, _, err = cli("infer", "-m", model, "-o", tmp_path / "out", "-n", 1)
    assert code == 2
    assert "radius is 'canary_xyz.A': it takes numbers" in err
    step = {"name": "HistogramStandardization", "landmarks": str(tmp_path / "evil.pt")}
    model = forge("data.preprocessing", [step], "vqvae")
    code, _, err = cli("infer", "-m", model, "-o", tmp_path / "out", "-d", phantoms)
    assert code == 2
    assert "landmarks is" in err
