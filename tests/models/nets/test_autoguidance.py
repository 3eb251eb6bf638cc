"""Autoguidance: which weights are kept, when, and that they guide."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import synthcube
from synthcube.models.families.rectified_flow import RectifiedFlowConfig
from synthcube.models.nets import autoguidance
from synthcube.models.nets.autoguidance import EarlierNetwork
from synthcube.schema import Condition, ImageSpec
from synthcube.tasks.train import train
from synthcube.training.ema import KeepEarlier

IMAGE = ImageSpec(
    size=(16, 16), channels=1, spacing_mm=(1, 1, 1), intensity_range=((0, 255),),
    affine=tuple(tuple(float(i == j) for j in range(4)) for i in range(4)), file_format="png",
)  # fmt: skip
KEPT = ["model.autoguidance_from=0.25", "model.autoguidance=1.5"]
NO_CONDITION = Condition(values=torch.zeros(2, 0), source=torch.zeros(2, 0, 16, 16))


def model(**keys: Any) -> Any:
    torch.manual_seed(0)
    values = RectifiedFlowConfig.tiny().model_dump() | {"autoguidance_from": 0.25} | keys
    return RectifiedFlowConfig.model_validate(values).build(IMAGE).eval()


def drawn(family: Any) -> torch.Tensor:
    with torch.no_grad():
        return family.sample([torch.Generator().manual_seed(seed) for seed in (1, 2)], NO_CONDITION)


def test_a_prediction_is_so_many_times_as_far_from_the_earlier_one() -> None:
    x_t, time = torch.zeros(2, 3, 4, 4), torch.zeros(2)
    predict = autoguidance.guided(
        lambda x, _: torch.full_like(x, 2.0), lambda x, _: torch.full_like(x, 1.0), 1.5, 2
    )
    prediction = predict(x_t, time)
    assert prediction[:, :2].unique().tolist() == [2.5]
    assert prediction[:, 2:].unique().tolist() == [2.0], "a variance is not exaggerated"


def test_the_earlier_network_computes_as_that_whose_weights_it_took_and_is_not_trained() -> None:
    family = model()
    family.earlier.keep(family.network)
    for weight in family.network.parameters():
        weight.data += 0.01
    other = model()
    x_t, time = torch.randn(2, 1, 16, 16), torch.tensor([10.0, 900.0])
    with torch.no_grad():
        before = other.network(x_t, time, NO_CONDITION)
        assert torch.equal(family.earlier.network(x_t, time, NO_CONDITION), before)
        assert not torch.equal(family.network(x_t, time, NO_CONDITION), before)
    assert not list(family.earlier.parameters())
    assert {f"earlier.network.{name}" for name in family.network.state_dict()} == {
        name for name in family.state_dict() if name.startswith("earlier.network.")
    }


def test_images_are_guided_only_once_weights_are_kept() -> None:
    plain, guided = model(), model(autoguidance=2.0)
    for family in (plain, guided):
        for weight in family.network.parameters():
            weight.data += 0.01
    assert torch.equal(drawn(plain), drawn(guided)), "the first, untrained weights guide nothing"
    for family in (plain, guided):
        family.earlier.keep(model().network)
    assert not torch.equal(drawn(plain), drawn(guided))
    guided.earlier.keep(guided.network)
    assert torch.allclose(drawn(plain), drawn(guided), atol=1e-5), "the same weights guide nowhere"


@pytest.mark.parametrize(("time_share", "kept_at"), [(0.0, 3), (0.3, 1)])
def test_the_average_is_kept_once_when_its_share_is_reached(
    time_share: float, kept_at: int
) -> None:
    """Of twelve steps a quarter, or of the time if that is sooner."""

    def family(value: float) -> Any:
        network = nn.Linear(1, 1, bias=False)
        nn.init.constant_(network.weight, value)
        return SimpleNamespace(
            network=network, earlier=EarlierNetwork(network), time_share=lambda: time_share
        )

    trained, averaged = family(0.0), family(0.0)
    callback = KeepEarlier(0.25, SimpleNamespace(model=averaged))  # type: ignore[arg-type]
    trainer: Any = SimpleNamespace(estimated_stepping_batches=12, global_step=0)
    callback.on_train_start(trainer, trained)
    for step in range(1, 13):
        trainer.global_step = step
        nn.init.constant_(trained.network.weight, 10.0 * step)
        nn.init.constant_(averaged.network.weight, float(step))
        callback.on_train_batch_end(trainer, trained)
        for one in (trained, averaged):
            assert float(one.earlier.is_kept) == (step >= kept_at)
            if step >= kept_at:
                assert float(one.earlier.network.weight) == kept_at
    again = KeepEarlier(0.25, None)
    again.load_state_dict(callback.state_dict())
    again.on_train_start(trainer, trained)
    again.on_train_batch_end(trainer, trained)
    assert float(trained.earlier.network.weight) == kept_at


def test_a_run_keeps_them_and_infer_may_leave_them_out(
    tiny_config, phantoms: Path, tmp_path: Path, cli
) -> None:
    run = tmp_path / "run"
    train(tiny_config(), phantoms, run, overrides=[*KEPT, "training.max_epochs=4"])
    weights = load_file(run / "artifact" / "weights.safetensors")
    assert int(weights["earlier.is_kept"]) == 1
    differs = [
        not torch.equal(value, weights[name.removeprefix("earlier.")])
        for name, value in weights.items()
        if name.startswith("earlier.network.")
    ]
    assert any(differs)
    trained = synthcube.from_pretrained(run)
    guided, plain = trained.sample(2), trained.sample(2, autoguidance=1)
    assert not torch.equal(guided.tensor, plain.tensor)
    words = ["infer", "-m", run, "-n", 2, "--set", "sampling.autoguidance=1"]
    assert cli(*words, "-o", tmp_path / "images")[0] == 0


def test_what_cannot_guide_is_refused(tiny_config, phantoms: Path, tmp_path: Path, cli) -> None:
    config, run = tiny_config(), tmp_path / "run"
    words = ["train", "-c", config, "-d", phantoms, "-o", run]
    code, _, err = cli(*words, "--set", "model.autoguidance=2")
    assert code == 2
    assert "model.autoguidance 2: no earlier weights are kept; set" in err
    code, _, err = cli(*words, "--set", KEPT[0], "--set", "compute.strategy=fsdp")
    assert code == 2
    assert "compute.strategy fsdp: model.autoguidance_from keeps whole weights" in err
    plan = ["federate", "plan", "-c", config, "-o", tmp_path / "plan.json", "--sites", "a,b"]
    plan += ["--rounds", 2]
    code, _, err = cli(*plan, "--set", KEPT[0])
    assert code == 2
    assert "model.autoguidance_from: sites keep no earlier weights; leave it out" in err
    assert cli(*words)[0] == 0
    code, _, err = cli("infer", "-m", run, "-o", tmp_path / "i", "--set", "sampling.autoguidance=2")
    assert code == 2
    assert "sampling.autoguidance 2: this model kept no earlier weights" in err
