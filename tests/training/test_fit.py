"""A training: what it writes, that it resumes exactly, and how it stops."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from synthcube.errors import ArtifactError, ConfigError, NonFiniteLossError, OutputError
from synthcube.models import registry
from synthcube.tasks.train import train
from synthcube.training import checkpoints


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "artifact" / "weights.safetensors")


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_run_folder_holds_everything(tiny_config, phantoms: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(tiny_config(), phantoms, run) == run / "artifact"
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert files == {
        "config.yaml", "split.csv", "images.json", "metrics.csv", "environment.json",
        "throughput.json", ".synthcube.lock", "curve.png",
        "samples/epoch_0001.png", "samples/epoch_0002.png",
        "checkpoints/best.ckpt", "checkpoints/last.ckpt",
        "artifact/artifact.json", "artifact/config.yaml", "artifact/image.json",
        "artifact/metrics.json", "artifact/samples.png", "artifact/versions.json",
        "artifact/weights.safetensors",
    }  # fmt: skip
    table = rows(run)
    assert [row["step"] for row in table if row["train/loss_now"]] == ["1", "2", "3", "4"]
    assert len([row for row in table if row["validation/loss"]]) == 2
    assert json.loads((run / "environment.json").read_text())["precision"] == "32-true"
    assert all(oct(path.stat().st_mode)[-3:] == "644" for path in run.rglob("*") if path.is_file())


@pytest.mark.parametrize("family", registry.names())
def test_a_resumed_run_ends_with_the_same_weights_bit_for_bit(
    family: str, tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    config = tiny_config(family)
    longer = ["training.max_epochs=3", "model.scheduler={name: constant_with_warmup}"]
    shorter = ["training.max_epochs=2", longer[1]]
    train(config, phantoms, tmp_path / "straight", overrides=longer)
    train(config, phantoms, tmp_path / "stopped", overrides=shorter)
    before = (tmp_path / "stopped" / "artifact" / "artifact.json").read_text()
    train(config, phantoms, tmp_path / "stopped", overrides=longer)
    states = [
        checkpoints.load(tmp_path / name / "checkpoints" / "last.ckpt")
        for name in ("straight", "stopped")
    ]
    for key in ("state_dict", "current_model_state"):
        for name, value in states[0][key].items():
            assert torch.equal(value, states[1][key][name]), f"{key}: {name}"
    assert states[0]["global_step"] == states[1]["global_step"]
    assert rows(tmp_path / "straight")[-1] == rows(tmp_path / "stopped")[-1]
    assert (tmp_path / "stopped" / "artifact" / "artifact.json").read_text() != before


@pytest.mark.slow
def test_a_run_that_ends_between_validations_is_prolonged(
    tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    """Epochs after the last validation are kept, counted rightly, and continued exactly."""
    common = ["training.validate_every_n_epochs=3", "model.scheduler=null"]
    straight, longer = tmp_path / "straight", tmp_path / "longer"
    train(tiny_config(), phantoms, straight, overrides=[*common, "training.max_epochs=5"])
    for number in (2, 4, 5):
        overrides = [*common, f"training.max_epochs={number}"]
        train(tiny_config(), phantoms, longer, overrides=overrides)
        assert checkpoints.reached(longer / "checkpoints" / "last.ckpt")[0] == number
    a, b = (checkpoints.weights(run / "checkpoints" / "last.ckpt") for run in (straight, longer))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_artifact_holds_the_averaged_weights(tiny_config, phantoms, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny_config(), phantoms, run)
    best = checkpoints.load(run / "checkpoints" / "best.ckpt")
    shared = weights(run)
    name = "network.out.2.conv.weight"
    assert torch.equal(shared[name], best["state_dict"][name])
    assert not torch.equal(shared[name], best["current_model_state"][name])


def test_the_average_ramps_up_as_documented(tiny_config, phantoms, tmp_path: Path) -> None:
    """Recomputed from the weights after each step: decay min(0.999, (1 + n) / (10 + n))."""
    from synthcube.training.ema import RampedEMA

    current = [torch.nn.Linear(3, 2) for _ in range(4)]
    ema = RampedEMA(0.999)
    averaged = torch.nn.Linear(3, 2)
    ema._update(averaged, current[0])
    expected = {name: weight.detach().clone() for name, weight in current[0].named_parameters()}
    for number, layer in enumerate(current[1:], start=1):
        layer.bias.requires_grad_(False)  # as a codebook, which moves without a gradient
        ema._latest_update_step = number
        ema._update(averaged, layer)
        decay = (1 + number) / (10 + number)
        for name, weight in layer.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * weight.detach()
    for name, weight in averaged.named_parameters():
        torch.testing.assert_close(weight.detach(), expected[name])


def test_the_average_leaves_out_what_is_not_drawn(tiny_config, phantoms, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny_config("dcgan"), phantoms, run)
    last = checkpoints.load(run / "checkpoints" / "last.ckpt")
    averaged, current = last["state_dict"], last["current_model_state"]
    for name in averaged:
        is_judge = name.startswith("discriminator.")
        moved = name.endswith("weight")
        assert torch.equal(averaged[name], current[name]) or not is_judge, name
        assert is_judge or not moved or not torch.equal(averaged[name], current[name]), name


def test_the_same_seed_trains_the_same_weights(tiny_config, phantoms, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(tiny_config(), phantoms, tmp_path / name, overrides=[f"seed={seed}"])
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


def test_a_finished_run_is_left_alone(tiny_config, phantoms, tmp_path: Path, caplog) -> None:
    run = tmp_path / "run"
    train(tiny_config(), phantoms, run)
    before = {path: path.stat().st_mtime_ns for path in (run / "checkpoints").iterdir()}
    with caplog.at_level("INFO", "synthcube"):
        train(tiny_config(), phantoms, run)
    assert "This training is complete; raise training.max_epochs" in caplog.text
    assert before == {path: path.stat().st_mtime_ns for path in (run / "checkpoints").iterdir()}


def test_a_lost_artifact_is_written_again(tiny_config, phantoms, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny_config(), phantoms, run)
    before = weights(run)
    shutil.rmtree(run / "artifact")
    train(tiny_config(), phantoms, run)
    assert all(torch.equal(before[name], value) for name, value in weights(run).items())


def test_another_config_does_not_continue_a_run(tiny_config, phantoms, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny_config(), phantoms, run)
    before = (run / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=r"trained with another config") as caught:
        train(tiny_config(), phantoms, run, overrides=["seed=5", "model.optimizer.lr=0.1"])
    assert set(caught.value.faults) == {
        "model.optimizer.lr: was 0.002, is 0.1",
        "seed: was 0, is 5",
    }
    assert (run / "config.yaml").read_text() == before


def test_other_data_does_not_continue_a_run(tiny_config, phantoms, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny_config(), phantoms, run)
    manifest = phantoms / "manifest.csv"
    manifest.write_text("\n".join(manifest.read_text().splitlines()[:-2]) + "\n")
    with pytest.raises(ConfigError, match=r"trained on other subjects \(12 images then, 10 now\)"):
        train(tiny_config(), phantoms, run)


def test_resume_never_and_paths(tiny_config, phantoms, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny_config(), phantoms, run, resume="never")
    with pytest.raises(OutputError, match="already holds a run, and --resume is never"):
        train(tiny_config(), phantoms, run, resume="never")
    with pytest.raises(ConfigError, match="there is no such checkpoint; use auto, never, or"):
        train(tiny_config(), phantoms, run, resume=str(tmp_path / "gone.ckpt"))
    other = tmp_path / "other"
    longer = ["training.max_epochs=3"]
    start = str(run / "checkpoints" / "last.ckpt")
    train(tiny_config(), phantoms, other, resume=start, overrides=longer)
    assert checkpoints.reached(other / "checkpoints" / "last.ckpt")[0] == 3


def test_a_damaged_checkpoint_is_named(tiny_config, phantoms, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny_config(), phantoms, run)
    last = run / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    with pytest.raises(ArtifactError, match=r"last\.ckpt cannot be read: it is damaged"):
        train(tiny_config(), phantoms, run, overrides=["training.max_epochs=3"])


def test_a_checkpoint_with_code_is_not_unpickled(tiny_config, phantoms, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (Path(tmp_path / "owned").touch, ())

    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": Evil()}, path)
    with pytest.raises(ArtifactError, match="damaged or not a checkpoint of SynthCube"):
        train(tiny_config(), phantoms, tmp_path / "run", resume=str(path))
    assert not (tmp_path / "owned").exists()


def test_a_loss_that_is_not_finite_stops_with_step_files_and_checkpoint(
    tiny_config, phantoms, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(tiny_config(), phantoms, run)
    with pytest.raises(
        NonFiniteLossError,
        match=r"The (loss became (nan|inf)|gradient became NaN or infinite in .*) at step \d+",
    ) as caught:
        train(
            tiny_config(), phantoms, tmp_path / "wild",
            overrides=[
                "model.optimizer={name: SGD, lr: 1e6}", "training.gradient_clip_norm=null",
                "model.scheduler=null", "training.max_epochs=3",
            ],
        )  # fmt: skip
    assert "Last good checkpoint: " in str(caught.value)
    assert len(caught.value.faults) == 4
    assert all(Path(fault).is_file() for fault in caught.value.faults)
    assert not (tmp_path / "wild" / "artifact").exists()


@pytest.mark.parametrize(
    "override",
    [
        "model.optimizer={name: SGD, lr: 0.01, momentum: 0.9}",
        "model.optimizer={name: Adam, lr: 0.001, betas: [0.5, 0.999]}",
        "model.scheduler={name: StepLR, step_size: 1}",
        "model.scheduler={name: OneCycleLR, max_lr: 0.01}",
        "model.scheduler={name: CosineAnnealingLR}",
        "model.scheduler={name: ReduceLROnPlateau, patience: 1}",
        "model.scheduler={name: polynomial}",
        "model.optimizer={name: adopt, lr: 0.001}",
        "model.losses=[{name: l1}, {name: SSIMLoss, weight: 0.1}]",
        "model.scheduler=null",
        "training.accumulate=2",
        "training.ema=null",
        "training.gradient_clip_norm=null",
        "data.validation_fraction=0",
        "data.augmentation=[{name: RandomFlip, axes: [0]}]",
        "data.num_workers=1",
        "compute.precision=bf16",
    ],
)
def test_options_train(override: str, tiny_config, phantoms, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny_config(), phantoms, run, overrides=[override, "training.max_epochs=1"])
    assert all(torch.isfinite(value).all() for value in weights(run).values())


def test_schedules_really_step(tiny_config, phantoms, tmp_path: Path) -> None:
    run = tmp_path / "run"
    overrides = ["model.scheduler={name: StepLR, step_size: 1, gamma: 0.1}"]
    train(tiny_config(), phantoms, run, overrides=overrides)
    rates = [float(row["lr"]) for row in rows(run) if row["lr"]]
    assert rates == pytest.approx([2e-3, 2e-3, 2e-4, 2e-4])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.validation_fraction=0", [2e-3] * 3 + [2e-4] * 3),
        ("training.validate_every_n_epochs=2", [2e-3] * 4),
    ],
)
def test_a_plateau_is_seen_where_there_is_a_loss(
    override: str, expected: list[float], tiny_config, phantoms, tmp_path: Path
) -> None:
    scheduler = "model.scheduler={name: plateau, patience: 0, threshold: 1e9}"
    train(tiny_config(), phantoms, tmp_path / "run", overrides=[scheduler, override])
    rates = [float(row["lr"]) for row in rows(tmp_path / "run") if row["lr"]]
    assert rates == pytest.approx(expected)


def test_when_the_time_is_up_nothing_learned_is_lost(
    tiny_config, phantoms, tmp_path: Path, caplog
) -> None:
    caplog.set_level("INFO", "synthcube")
    run = tmp_path / "run"
    overrides = [
        "training.max_epochs=10000", "training.max_minutes=0.02",
        "training.validate_every_n_epochs=9999", "training.sample_every_n_epochs=0",
    ]  # fmt: skip
    train(tiny_config(), phantoms, run, overrides=overrides)
    epochs, steps = checkpoints.reached(run / "checkpoints" / "last.ckpt")
    assert 1 <= epochs < 9999
    assert steps > 0
    said = f"Stopped by training.max_minutes (0.02) after {epochs} of 10000 epochs, {steps} steps."
    assert said in caplog.text
    losses = [row["validation/loss"] for row in rows(run) if row["validation/loss"]]
    assert len(losses) == 1, "the last weights are validated, although the epoch was none for it"
    assert (run / "checkpoints" / "best.ckpt").exists()
    assert checkpoints.reached(run / "checkpoints" / "best.ckpt")[1] == steps
    before = (run / "artifact" / "artifact.json").read_text()
    train(tiny_config(), phantoms, run, overrides=overrides)
    assert (run / "artifact" / "artifact.json").read_text() == before
