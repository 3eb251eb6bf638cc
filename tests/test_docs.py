"""What is documented runs: every command of the pages, and the reference is fresh."""

from __future__ import annotations

import importlib.util
import re
import runpy
import shlex
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from generative.networks.nets import VQVAE, DiffusionModelUNet, PatchDiscriminator

from synthcube import config, reading
from synthcube.data.manifest import read_manifest
from synthcube.data.phantom import write_phantoms
from synthcube.models import losses, optimizers

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# What a command that is not ours may begin with; none of them needs a test of ours.
OTHERS = (
    "make ", "git ", "cd ", "pip ", ".venv/bin/pre-commit", "python -m bench", "python docs/",
    "python examples/",
)  # fmt: skip


def commands(page: Path) -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip() and line[0] != "#"]


@pytest.fixture
def newcomer(tmp_path: Path) -> Path:
    """A folder like a clone of the project, with small stand-ins for the reader's own data."""
    for name in ("workspace", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("Hand", "HeadCT"):
        write_phantoms(tmp_path / "MedNIST" / name, num=8, size=(64, 64))
    write_phantoms(tmp_path / "volumes", num=4, size=(32, 32, 32), spacing_mm=(1, 1, 2))
    write_phantoms(tmp_path / "pictures", num=8, size=(32, 32))
    for name in ("sub-1_task-rest_bold", "sub-2_task-rest_bold"):
        (tmp_path / "fmri").mkdir(exist_ok=True)
        nib.Nifti1Image(np.arange(8**4, dtype="i2").reshape(8, 8, 8, 8), np.eye(4)).to_filename(
            tmp_path / "fmri" / f"{name}.nii.gz"
        )
    pairs = write_phantoms(tmp_path / "pairs", num=8, size=(32, 32), channels=2)
    lines = [";".join(map(str, (*row.channels, row.subject))) for row in read_manifest(pairs).rows]
    (tmp_path / "cohort.csv").write_text("\n".join(["t1_path;mask;patient", *lines]))
    _write_old_weights(tmp_path)
    _write_old_project(tmp_path)
    return tmp_path


def _write_brats(folder: Path) -> None:
    """What docs/image-and-mask.md has its reader write: fewer cases, and a smaller network."""
    path = ROOT / "examples" / "brats_like.py"
    module = runpy.run_path(str(path))
    module["write"](folder / "my-brats", cases=8)
    page = (ROOT / "docs" / "image-and-mask.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    values = yaml.safe_load(block)
    values["model"] |= {"channels": [8, 16], "num_sampling_steps": 2}
    (folder / "brats.yaml").write_text(reading.dump(values), encoding="utf-8")


def _write_challenge(folder: Path, brats: ModuleType) -> None:
    """What docs/how-to/challenges.md has its reader write: fewer cases, and a smaller network."""
    for name, count in (("brats-train", 4), ("brats-validation", 3)):
        cases = [f"BraTS-GLI-{i:05d}-{count:03d}" for i in range(count)]
        brats.inpainting_cases(folder / name, cases, whole=True)
    page = (ROOT / "docs" / "how-to" / "challenges.md").read_text(encoding="utf-8")
    values = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)[0])
    values["model"] |= {"channels": [8, 8], "num_res_blocks": 1}
    values["data"]["patches"] = [16, 16, 16]
    (folder / "inpainting.yaml").write_text(reading.dump(values), encoding="utf-8")


def _write_old_project(folder: Path) -> None:
    rows = read_manifest(folder / "pictures").rows
    lines = [str(channel.resolve()) for row in rows for channel in row.channels]
    (folder / "old-project.csv").write_text("\n".join(["Channel_0", *lines]))
    (folder / "old-project.yaml").write_text(
        "modality: rad\nnum_epochs: 1\nbatch_size: 4\nmodel_config:\n  model_name: vqvae\n"
        "  n_dimensions: 2\n  n_channels: 1\n  tensor_shape: [32, 32]\n  losses: {name: mse}\n"
        "  optimizers: {name: adam, lr: 0.001}\n  architecture: {num_residual_layers: 3, "
        "num_channels_upsample_downsample_layers: [8, 8, 8], num_residual_channels: [8, 8, 8]}\n"
    )


def _write_old_weights(folder: Path) -> None:
    autoencoder = VQVAE(
        spatial_dims=2, in_channels=1, out_channels=1, num_channels=(8, 8), num_res_layers=1,
        num_res_channels=(8, 8), downsample_parameters=((2, 4, 1, 1),) * 2,
        upsample_parameters=((2, 4, 1, 1, 0),) * 2, num_embeddings=8, embedding_dim=4,
    )  # fmt: skip
    torch.save(autoencoder.state_dict(), folder / "autoencoder.pt")
    discriminator = PatchDiscriminator(
        spatial_dims=2, num_channels=8, in_channels=1, num_layers_d=3, norm="BATCH"
    )
    torch.save(discriminator.state_dict(), folder / "discriminator.pt")
    (folder / "old-vqvae.yaml").write_text(
        "data: {size: [32, 32]}\nmodel: {name: vqvae, channels: [8, 8], num_res_layers: 1, "
        "num_embeddings: 8, embedding_dim: 4, discriminator_channels: 8, "
        "num_discriminator_layers: 3}\n"
    )
    network = DiffusionModelUNet(
        spatial_dims=2, in_channels=1, out_channels=1, num_channels=(8, 8), num_res_blocks=1,
        attention_levels=(False, True), norm_num_groups=8, num_head_channels=8,
    )  # fmt: skip
    torch.save(network.state_dict(), folder / "old.pt")
    (folder / "old.yaml").write_text(
        "data: {size: [16, 16]}\nmodel: {name: ddpm, channels: [8, 8], num_res_blocks: 1, "
        "attention_from: 1, num_sampling_steps: 2}\n"
    )
    # GaNDLF-Synth has no `.conv` in its names.
    bare = re.compile(r"\.conv(?=\.(weight|bias)$)")
    state = {f"model.{bare.sub('', name)}": v for name, v in network.state_dict().items()}
    (folder / "old-run" / "checkpoints").mkdir(parents=True)
    torch.save({"state_dict": state}, folder / "old-run" / "checkpoints" / "last.ckpt")
    (folder / "gandlf.yaml").write_text(
        "modality: rad\nmodel_config: {model_name: ddpm, n_dimensions: 2, n_channels: 1, "
        "tensor_shape: [16, 16], architecture: {num_channels: [8, 8], num_res_blocks: [1, 1], "
        "attention_levels: [false, true], norm_num_groups: 8, num_train_timesteps: 2, "
        "num_eval_timesteps: 2}}\n"
    )


def _marked(page: Path) -> Any:
    """Pages with commands of ours, most of which train, are slow tests."""
    is_slow = any(command.startswith("synthcube ") for command in commands(page))
    name = str(page.relative_to(ROOT))
    return pytest.param(page, id=name, marks=pytest.mark.slow if is_slow else ())


@pytest.mark.parametrize("page", [_marked(page) for page in PAGES])
def test_every_command_runs_as_written(
    page: Path, newcomer: Path, brats: ModuleType, forks
) -> None:
    """As written, but a training is short, and images are drawn in few steps."""
    if page.name == "image-and-mask.md":
        _write_brats(newcomer)
    if page.name == "challenges.md":
        _write_challenge(newcomer, brats)
    if page.name == "slides.md":
        module = runpy.run_path(str(ROOT / "examples" / "he_like.py"))
        module["write"](newcomer / "my-slides", slides=5, size=(1024, 768))
    if page.name in ("dicom.md", "bids.md"):  # with so many heads the ages asked for are known
        module = runpy.run_path(str(ROOT / "examples" / "head_like.py"))
        module["write"](newcomer / "ct-scans", subjects=16)
        module["write"](newcomer / "my-bids", subjects=16, bids=True)
    for line in commands(page):
        if line.startswith(OTHERS):
            continue
        words = shlex.split(line)
        assert words[0] == "synthcube", f"{page.name}: is this tested? {line}"
        if words[1] == "train":
            words += _short_training(words, newcomer)
        target = None
        if ">" in words:
            target = newcomer / words[words.index(">") + 1]
            words = words[: words.index(">")]
        done = forks.command(*words[1:], cwd=newcomer)
        assert done.returncode == 0, f"{page.name}: {line}\n{done.stderr}"
        if target:
            target.write_text(done.stdout)


def _short_training(words: list[str], folder: Path) -> list[str]:
    """Options that make a training short, and the drawing of its images too."""
    keys = ["training.max_epochs=1", "training.num_sample_images=2"]
    configs = [folder / words[place + 1] for place, word in enumerate(words) if word == "-c"]
    models = [yaml.safe_load(path.read_text()).get("model", {}) for path in configs]
    families = {model.get("name", "rectified_flow") for model in models}
    if not configs:
        keys.append("model.channels=[16,16]")  # of the network that is planned
    if families <= {"rectified_flow", "ddpm"}:
        keys.append("model.num_sampling_steps=2")
    return [word for key in keys for word in ("--set", key)]


def test_make_targets_in_the_pages_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        named = set(re.findall(r"(?:`|^)make ([a-z-]+)", page.read_text(), re.MULTILINE))
        assert named <= targets, f"{page.name}: {named - targets}"


def test_the_reference_is_what_the_fields_say() -> None:
    path = ROOT / "docs" / "make_reference.py"
    specification = importlib.util.spec_from_file_location("make_reference", path)
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    assert (ROOT / "docs" / "reference.md").read_text(encoding="utf-8") == module.reference()


def named(section: str) -> list[str]:
    """The names in the first column of the tables of a section of docs/names.md."""
    page = (ROOT / "docs" / "names.md").read_text(encoding="utf-8")
    part = page.split(f"## {section}\n")[1].split("\n## ")[0]
    firsts = re.findall(r"^\| (`.*?) \|", part, re.MULTILINE)
    return sorted(name for cell in firsts for name in re.findall(r"`([^`]+)`", cell))


def test_every_name_is_in_the_table_of_names_and_no_other() -> None:
    """That each of them works is tested in test_losses.py and test_optimization.py."""
    assert named("Losses") == sorted(losses.known_losses())
    assert named("Optimizers") == sorted(optimizers.known_optimizers())
    assert named("Schedules") == sorted(optimizers.known_schedules())
    assert named("Not by name") == sorted(
        losses.UNUSABLE_LOSSES.keys()
        | optimizers.UNUSABLE_OPTIMIZERS.keys()
        | optimizers.UNUSABLE_SCHEDULES.keys()
    )


def test_the_example_of_names_is_a_valid_config(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "names.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    path = tmp_path / "names.yaml"
    path.write_text(block, encoding="utf-8")
    assert len(config.load(path).dump()["model"]["losses"]) == 2


def test_links_and_pictures_in_the_pages_exist() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if not target.startswith(("http://", "https://")):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_no_file_is_over_a_mebibyte() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    sizes = {name: (ROOT / name).stat().st_size for name in listed.stdout.split("\0") if name
             and (ROOT / name).is_file()}  # fmt: skip
    assert {name for name, size in sizes.items() if size > 1 << 20} == set()


@pytest.mark.slow
def test_the_python_examples_run(newcomer: Path, forks, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "train -c workspace/config.yaml -d workspace/data -o demo-run"
    words += " --set training.max_epochs=1 --set model.num_sampling_steps=2"
    assert forks.command(*shlex.split(words), cwd=newcomer).returncode == 0
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(newcomer)
    exec("\n".join(examples), {})
    assert (newcomer / "four.png").is_file()
    assert len(list((newcomer / "images").iterdir())) == 4
    assert len(list((newcomer / "python-images" / "images").iterdir())) == 8
    assert (newcomer / "python-results.yaml").is_file()
