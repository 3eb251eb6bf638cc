"""Strategies that cut the weights into pieces, in two real processes, against ddp."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from synthcube import config
from synthcube.compute import ComputeConfig
from synthcube.errors import ConfigError
from synthcube.models import registry
from synthcube.tasks.infer import InferRequest, infer
from synthcube.tasks.train import train
from synthcube.training import deepspeed, strategies

SCRIPT = Path(__file__).parents[1] / "each_rank.py"
TWO = "compute.num_devices=2"
ALONE = [name for name in registry.names() if not registry.find(name).tiny().optimizes_by_hand()]


@pytest.fixture
def together(forks):
    """Trains in two processes; returns what they wrote on standard error."""

    def run(config: Path, data: Path, run: Path, *overrides: str) -> str:
        return forks.script_together(SCRIPT, config, data, run, TWO, *overrides)

    return run


@pytest.fixture
def zero(forks, built: Path):
    """The same by DeepSpeed's ZeRO."""

    def run(config: Path, data: Path, run: Path, *overrides: str) -> str:
        script = Path(__file__).with_name("zero_each_rank.py")
        return forks.script_together(
            script, config, data, run, TWO, "compute.strategy=deepspeed", *overrides,
            DS_ACCELERATOR="cpu", TORCH_EXTENSIONS_DIR=str(built),
        )  # fmt: skip

    return run


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where DeepSpeed's C++ is compiled, once for all workers; it waits for who is at it.

    Not in the home folder, for what a killed build leaves makes the next one wait for ever.
    """
    if "TORCH_EXTENSIONS_DIR" in os.environ:
        return Path(os.environ["TORCH_EXTENSIONS_DIR"])
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    return shared / "deepspeed-built"


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "artifact" / "weights.safetensors")


# The others share code with these; they are run with the slow tests.
QUICK = ("vqvae",)


@pytest.mark.parametrize(
    "family",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ALONE],
)
def test_fsdp_ends_with_the_weights_of_ddp(
    family: str, tiny_config, phantoms: Path, tmp_path: Path, together
) -> None:
    config = tiny_config(family)
    for strategy in ("ddp", "fsdp"):
        together(config, phantoms, tmp_path / strategy, f"compute.strategy={strategy}")
    whole, cut = weights(tmp_path / "ddp"), weights(tmp_path / "fsdp")
    assert whole.keys() == cut.keys()
    for name, expected in whole.items():
        torch.testing.assert_close(cut[name], expected, rtol=1e-4, atol=1e-6, msg=name)
    assert sorted(path.name for path in (tmp_path / "fsdp" / "samples").iterdir()) == [
        "epoch_0001.png", "epoch_0002.png",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("first", ["ddp", "fsdp"])
def test_ddp_and_fsdp_continue_each_other(
    first: str, tiny_config, phantoms: Path, tmp_path: Path, together
) -> None:
    config, second = tiny_config("vqvae"), {"ddp": "fsdp", "fsdp": "ddp"}[first]
    constant = "model.scheduler=null"
    together(config, phantoms, tmp_path / "straight", constant, f"compute.strategy={first}")
    together(config, phantoms, tmp_path / "changed", constant, f"compute.strategy={first}",
             "training.max_epochs=1")  # fmt: skip
    log = together(config, phantoms, tmp_path / "changed", constant, f"compute.strategy={second}")
    assert "Continuing after epoch 1" in log
    straight, changed = weights(tmp_path / "straight"), weights(tmp_path / "changed")
    for name, expected in straight.items():
        torch.testing.assert_close(changed[name], expected, rtol=1e-4, atol=1e-6, msg=name)


def refused(*overrides: str, family: str = "ddpm") -> str:
    with pytest.raises(ConfigError) as error:
        config.build({"model": {"name": family}}, overrides)
    return str(error.value)


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed"])
@pytest.mark.parametrize("family", ["dcgan", "stylegan"])
def test_two_optimizers_are_refused_with_the_families_that_have_one(
    strategy: str, family: str
) -> None:
    text = refused(f"compute.strategy={strategy}", family=family)
    assert f"{strategy} trains with one optimizer, and this {family}" in text
    assert f"or one of {', '.join(ALONE)}" in text


def test_an_autoencoder_is_refused_with_a_discriminator_only() -> None:
    config.build({"model": {"name": "vqvae"}}, ["compute.strategy=fsdp"])
    text = refused("compute.strategy=fsdp", "model.adversarial_weight=0.1", family="vqvae")
    assert "use ddp, or one of" in text


@pytest.mark.parametrize("precision", ["64", "16", "bf16-true"])
def test_fsdp_shards_float32_only(precision: str) -> None:
    assert f"compute.precision is {precision}: fsdp shards" in refused(
        "compute.strategy=fsdp", f"compute.precision={precision}"
    )


def test_arguments_of_each_strategy_are_known_by_name() -> None:
    text = refused("compute.strategy=fsdp", "compute.strategy_config={cpu: true}")
    assert "no argument 'cpu'; fsdp takes process_group_backend, reshard_after_forward" in text
    text = refused("compute.strategy=deepspeed", "compute.strategy_config={stag: 2}")
    assert "no argument 'stag'; deepspeed takes " in text
    assert "offload_optimizer" in text


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "this is not JSON"),
        ("[]", "this is not a JSON object"),
        ('{"zero_optimization": {"stage": 4}}', "zero_optimization.stage is 4: it is 0, 1, 2 or 3"),
        ('{"train_batch_size": 3}', "train_batch_size is 3, the YAML gives 32: remove it"),
        ('{"gradient_accumulation_steps": 4}', "gradient_accumulation_steps is 4"),
        ('{"train_micro_batch_size_per_gpu": 16}', "train_micro_batch_size_per_gpu is 16"),
        ('{"gradient_clipping": 3}', "gradient_clipping is 3, the YAML gives 1"),
        ('{"bf16": {"enabled": true}}', "bf16 is enabled: remove it, and set compute.precision"),
        ('{"scheduler": {"type": "WarmupLR"}}', "scheduler is not used without optimizer"),
        ('{"zero_optimization": {"stage": 3}}', "stage 3 of deepspeed does not have"),
    ],
)
def test_faults_of_the_file_of_deepspeed(content: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text(content)
    text = refused(
        "compute.strategy=deepspeed", f"compute.strategy_config={{config: {path}}}",
        "training.accumulate=2", "compute.num_devices=2",
    )  # fmt: skip
    assert str(path) in text or "training.ema" in text
    assert expected in text


def test_a_file_of_deepspeed_that_says_what_the_yaml_says(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text(
        '{"train_batch_size": 16, "train_micro_batch_size_per_gpu": 8, "gradient_clipping": 1.0, '
        '"zero_optimization": {"stage": 1}, "optimizer": {"type": "Adam"}}'
    )
    built = config.build(
        {"model": {"name": "ddpm"}},
        ["compute.strategy=deepspeed", f"compute.strategy_config={{config: {path}}}",
         "compute.num_devices=2"],
    )  # fmt: skip
    assert deepspeed.own_optimizer(built.compute) == "Adam"
    settings = deepspeed.arguments(built.compute, built.training, 2)["config"]
    assert settings["zero_optimization"] == {"stage": 1}
    assert settings["train_micro_batch_size_per_gpu"] == 8
    assert "train_batch_size" not in settings  # Lightning does not take it


def test_a_missing_file_and_a_file_beside_arguments() -> None:
    text = refused(
        "compute.strategy=deepspeed", "compute.strategy_config={config: no.json, stage: 1}"
    )
    assert "no.json: No such file" in text
    assert "compute.strategy_config.stage: DeepSpeed's file (config) replaces all other" in text


@pytest.mark.parametrize("installed", [True, False])
def test_deepspeed_is_refused_without_its_package_or_without_a_gpu(
    installed: bool, cli, tiny_config, phantoms, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deepspeed, "find_spec", lambda _: object() if installed else None)
    for command in (["train", "-o", tmp_path / "run"], ["check"]):
        code, _, text = cli(
            *command, "-c", tiny_config(), "-d", phantoms, "--set", "compute.strategy=deepspeed"
        )
        assert code == 2
        expected = "on NVIDIA GPUs only, and this is a CPU" if installed else "synthcube[deepspeed]"
        assert expected in text
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_artifact_of_a_real_zero_run_is_what_deepspeed_puts_together(
    stage: int, tiny_config, phantoms: Path, tmp_path: Path, zero
) -> None:
    """DeepSpeed's CPU accelerator, in two processes; its own script reads its pieces."""
    _need_deepspeed()
    path, run = tiny_config("vqvae"), tmp_path / "run"
    asked = [f"compute.strategy_config={{stage: {stage}}}", "training.ema=null",
             "model.scheduler=null", "compute.precision=bf16"]  # fmt: skip
    zero(path, phantoms, tmp_path / "straight", *asked)
    zero(path, phantoms, run, *asked, "training.max_epochs=1")
    log = zero(path, phantoms, run, *asked)
    assert "Continuing after epoch 1" in log
    resumed, theirs = weights(run), load_file(run / "deepspeed.safetensors")
    frozen = {"network.quantizer.quantizer.embedding.weight"}  # which its script forgets at stage 1
    assert resumed.keys() - theirs.keys() == (frozen if stage == 1 else set())
    assert all(torch.equal(resumed[name], theirs[name].float()) for name in theirs)
    straight = weights(tmp_path / "straight")
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)
    with pytest.raises(ConfigError, match="the checkpoint was written by deepspeed"):
        train(path, phantoms, run, overrides=["training.ema=null", "model.scheduler=null",
                                              "training.max_epochs=3"])  # fmt: skip
    infer(InferRequest(run, tmp_path / "images", data=phantoms))


def test_the_configs_of_the_page_are_valid(tmp_path: Path, monkeypatch) -> None:
    page = Path(__file__).parents[2] / "docs" / "how-to" / "many-gpus.md"
    monkeypatch.chdir(tmp_path)
    Path("zero.json").write_text('{"zero_optimization": {"stage": 2}}')
    blocks = re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    built = [config.build(yaml.safe_load(block)) for block in blocks]
    assert [settings.compute.strategy for settings in built] == ["fsdp", "deepspeed"]


def test_a_checkpoint_of_zero_fits_its_stage_and_number_of_processes() -> None:
    compute = ComputeConfig(strategy="deepspeed", strategy_config={"stage": 2})
    content = {"zero": {"tag": "step_4", "stage": 2, "processes": 2}}
    strategies.require_same(content, compute, 2)
    with pytest.raises(ConfigError, match=r"at stage 2 with 2 process.* this is stage 2 with 4"):
        strategies.require_same(content, compute, 4)
    with pytest.raises(ConfigError, match="the checkpoint was written without deepspeed"):
        strategies.require_same({}, compute, 2)


@pytest.mark.slow
def test_zero_averages_weights_as_ddp_does(
    tiny_config, phantoms: Path, tmp_path: Path, together, zero
) -> None:
    _need_deepspeed()
    path = tiny_config("vqvae")
    together(path, phantoms, tmp_path / "ddp")
    zero(path, phantoms, tmp_path / "zero")
    expected, averaged = weights(tmp_path / "ddp"), weights(tmp_path / "zero")
    for name in expected:
        torch.testing.assert_close(averaged[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)


def _need_deepspeed() -> None:
    if not importlib.util.find_spec("deepspeed"):
        pytest.skip("the extra deepspeed is not installed")
    if not shutil.which("g++"):
        pytest.skip("DeepSpeed compiles C++, and there is no compiler")
