"""A federation on one machine: it trains as it should, continues after a kill, and refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from synthcube import plugins, reading
from synthcube.config import load_any
from synthcube.data.manifest import read_manifest, write_manifest
from synthcube.data.phantom import write_phantoms
from synthcube.errors import ConfigError, FederationError, OutputError
from synthcube.federation import audit
from synthcube.federation.agreement import Agreement
from synthcube.federation.plan import checked_plan
from synthcube.federation.update import read_update
from synthcube.tasks.federate import divide, divide_by_column, simulate
from synthcube.tasks.federated_model import initial_model, recorded_agreement
from synthcube.tasks.federated_site import Site
from synthcube.tasks.infer import InferRequest, infer
from synthcube.tasks.train import train
from synthcube.training import checkpoints

EXACT = ["compute.deterministic=true", "training.ema={decay: 0.9}"]
CONDITIONS = "data.conditions={Label: class, Radius: number}"
# One step of plain SGD at each site: all its images in a batch, none held out.
ONE_STEP = [
    "model.optimizer={name: sgd, lr: 0.5}", "training.ema=null", "training.num_sample_images=2",
    "training.batch_size=64", "data.validation_fraction=0", "training.gradient_clip_norm=null",
]  # fmt: skip


def state(run: Path) -> dict[str, object]:
    """What a run goes on with: weights, moving average, the optimizer's state, the schedule."""
    content = checkpoints.load(run / "checkpoints" / "last.ckpt")
    keys = ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers", "global_step")
    return {key: content[key] for key in keys}


def assert_same(one: object, other: object) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    else:
        assert one == other


@pytest.mark.slow
@pytest.mark.parametrize("family", ["rectified_flow", "dcgan", "latent_diffusion"])
def test_a_federation_of_one_site_is_plain_training_bit_for_bit(
    family: str, tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    config, overrides = tiny_config(family), [*EXACT, CONDITIONS]
    train(config, phantoms, tmp_path / "plain", overrides=[*overrides, "training.max_epochs=3"])
    simulate(config, phantoms, tmp_path / "one", sites=1, num_rounds=3, overrides=overrides)
    site = tmp_path / "one" / "sites" / "site-1" / "run"
    assert_same(state(site), state(tmp_path / "plain"))
    expected = checkpoints.weights(tmp_path / "plain" / "checkpoints" / "last.ckpt")
    averaged = load_file(tmp_path / "one" / "artifact" / "weights.safetensors")
    assert_same(averaged, expected)


def test_two_sites_end_in_a_model_that_makes_images(
    tiny_config, phantoms: Path, tmp_path: Path, cli
) -> None:
    run = tmp_path / "run"
    words = ("-c", tiny_config(), "-d", phantoms, "--sites", 2, "--rounds", 2, "-o", run)
    code, out, errors = cli(
        "federate", "simulate", *words, "--set", CONDITIONS, "--range", "Radius=0,20"
    )
    assert (code, out.splitlines()[-1]) == (0, f"Trained model: {run / 'artifact'}"), errors
    infer(InferRequest(run, tmp_path / "images", num_images="2", conditions=["Label=disc"]))
    assert len(list((tmp_path / "images" / "images").iterdir())) == 2

    image = json.loads((run / "artifact" / "image.json").read_text())
    assert image["conditions"][1] | {"description": None} == {
        "name": "Radius", "kind": "number", "classes": [], "low": 0.0, "high": 20.0,
        "description": None,
    }  # fmt: skip
    lines = audit.read(run / "sites" / "site-1" / "audit.jsonl")
    assert [(line.event, line.kind, line.round) for line in lines] == [
        ("sent", "facts", 0), ("received", "agreement", 0), ("sent", "weights", 1),
        ("received", "average", 1), ("sent", "weights", 2),
    ]  # fmt: skip
    text = (run / "sites" / "site-1" / "audit.jsonl").read_text()
    assert "phantom" not in text
    assert str(tmp_path) not in text


def test_masked_weights_make_the_model_of_open_ones_and_are_not_kept(
    tiny_config, phantoms: Path, tmp_path: Path, cli
) -> None:
    config = tiny_config()
    exact = [word for text in EXACT for word in ("--set", text)]
    for name, more in (("open", []), ("secure", ["--secure_aggregation"])):
        code, _, errors = cli("federate", "simulate", "-c", config, "-d", phantoms, "--rounds", 1,
                              "-o", tmp_path / name, *exact, *more)  # fmt: skip
        assert code == 0, errors
    expected, secure = (
        load_file(tmp_path / name / "artifact" / "weights.safetensors")
        for name in ("open", "secure")
    )
    for name, weight in expected.items():
        torch.testing.assert_close(secure[name], weight, rtol=2**-23, atol=1e-12)
    sent = load_file(tmp_path / "secure" / "sites" / "site-1" / "update.safetensors")
    assert {tensor.dtype for tensor in sent.values()} == {torch.int64}

    folder = tmp_path / "secure"
    plan = checked_plan(json.loads((folder / "federation.json").read_text()), folder)
    site: Any = Site("site-1", folder / "sites" / "site-1", plan, None)  # type: ignore[arg-type]
    (line,) = (line for line in audit.read(site.folder / "audit.jsonl") if line.kind == "weights")
    site._require_same(1, line.sha256)
    with pytest.raises(FederationError, match="has sent other weights in round 1, with the same"):
        site._require_same(1, "0" * 64)


def test_masks_need_all_sites_in_each_round(tiny_config, tmp_path: Path, cli) -> None:
    words = ("federate", "plan", "-c", tiny_config(), "--sites", "a,b,c", "--rounds", 2,
             "--secure_aggregation", "-o", tmp_path / "plan.json")  # fmt: skip
    code, _, errors = cli(*words, "--minimum_sites", 2)
    assert (code, "masks cancel in the sum of all 3 sites; leave it out" in errors) == (2, True)
    assert cli(*words)[0] == 0
    written = json.loads((tmp_path / "plan.json").read_text())
    assert (written["minimum_sites"], written["secure_aggregation"]) == (3, True)


def test_no_subject_is_at_two_sites(tmp_path: Path) -> None:
    path = write_phantoms(tmp_path / "data", num=12, size=(16, 16))
    lines = path.read_text().splitlines()
    # two images of each subject
    people = [lines[0], *(line.replace(f"phantom-{n:05d},", f"p{n // 2},") for n, line in
                          enumerate(lines[1:]))]  # fmt: skip
    path.write_text("\n".join(people))
    manifest, labels = read_manifest(path), ["site-1", "site-2", "site-3"]
    shares = divide(manifest, labels, 0)
    subjects = {label: {row["SubjectID"] for row in rows} for label, rows in shares.items()}
    assert sorted(name for names in subjects.values() for name in names) == [
        f"p{number}" for number in range(6)
    ]
    assert sum(len(rows) for rows in shares.values()) == 12
    assert shares == divide(manifest, labels, 0)
    with pytest.raises(FederationError, match="6 subjects are too few for 7 sites: site-"):
        divide(manifest, [f"site-{number}" for number in range(1, 8)], 0)


def test_a_column_names_the_sites(tiny_config, phantoms: Path, tmp_path: Path) -> None:
    manifest = read_manifest(phantoms)
    shares = divide_by_column(manifest, "Label")
    assert list(shares) == sorted({row.label_name for row in manifest.rows})
    assert {row["LabelMapping"] for row in shares["ring"]} == {"ring"}

    run = tmp_path / "run"
    simulate(tiny_config(), phantoms, run, site_column="Label", num_rounds=1, overrides=EXACT)
    for number, (value, rows) in enumerate(shares.items(), start=1):
        site = read_manifest(run / "sites" / f"site-{number}" / "data.csv")
        assert {row.label_name for row in site.rows} == {value}
        assert len(site.rows) == len(rows)

    rows = [row.cells | {"Centre": "b" if index else ""} for index, row in enumerate(manifest.rows)]
    write_manifest(tmp_path / "list.csv", rows)
    with pytest.raises(FederationError, match=r"--site_column Centre: 1 of \d+ rows have no value"):
        divide_by_column(read_manifest(tmp_path / "list.csv"), "Centre")
    write_manifest(tmp_path / "list.csv", [row | {"SubjectID": "one"} for row in rows])
    with pytest.raises(
        FederationError, match="1 subjects have more than one value; a subject must"
    ):
        divide_by_column(read_manifest(tmp_path / "list.csv"), "LabelMapping")
    with pytest.raises(ConfigError, match="give data, and no --sites"):
        simulate(tiny_config(), phantoms, run, sites=2, site_column="Label")


@pytest.fixture
def reconstructing(tmp_path: Path, phantoms: Path):
    """Writes the YAML of a family without noise, so that a step depends on the images alone."""
    text = (Path(__file__).parents[1] / "normed_family.py").read_text(encoding="utf-8")
    folder = tmp_path / "plugins"
    folder.mkdir()
    plugins.vouch([folder])

    def write(name: str, layer: str) -> Path:
        family = text.replace("normed_family", name).replace("torch.nn.BatchNorm2d(4)", layer)
        (folder / f"{name}.py").write_text(family, encoding="utf-8")
        model = {"name": f"{name}:NormedConfig", "scheduler": None}
        compute = {"accelerator": "cpu", "precision": "32"}
        path = tmp_path / f"{name}.yaml"
        path.write_text(reading.dump({"model": model, "compute": compute}), encoding="utf-8")
        return path

    return write


@pytest.mark.slow
def test_one_step_at_two_sites_is_one_step_on_all_images(reconstructing, tmp_path: Path) -> None:
    data = write_phantoms(tmp_path / "odd", num=13, size=(16, 16)).parent
    config, run = reconstructing("smooth_family", "torch.nn.Identity()"), tmp_path / "run"
    simulate(config, data, run, num_rounds=1, overrides=ONE_STEP)
    train(config, data, tmp_path / "central", overrides=[*ONE_STEP, "training.max_epochs=1"])
    counts = json.loads((run / "agreement.json").read_text())["images"]
    assert sorted(counts.values()) == [6, 7]
    central = checkpoints.weights(tmp_path / "central" / "checkpoints" / "last.ckpt")
    federated = load_file(run / "artifact" / "weights.safetensors")
    alone = load_file(run / "sites" / "site-1" / "update.safetensors")
    for name, expected in central.items():
        torch.testing.assert_close(federated[name], expected, atol=1e-6, rtol=0)
    moved = (alone["averaged.network.0.weight"] - central["network.0.weight"]).abs().max()
    assert moved > 1e-5, "one site alone took another step"


def test_a_proximal_term_is_one_term_of_the_loss(
    reconstructing, phantoms: Path, tmp_path: Path
) -> None:
    """The second of two steps of SGD has the gradient mu * (w1 - w0) more."""
    config = reconstructing("proximal_family", "torch.nn.Identity()")

    def weights(name: str, epochs: int, proximal: float = 0.0) -> dict[str, torch.Tensor]:
        simulate(config, phantoms, tmp_path / name, sites=1, num_rounds=1, local_epochs=epochs,
                 proximal=proximal, overrides=ONE_STEP)  # fmt: skip
        return load_file(tmp_path / name / "artifact" / "weights.safetensors")

    one, two, held = weights("one", 1), weights("two", 2), weights("held", 2, 3.0)
    agreement = recorded_agreement(tmp_path / "one")
    start = initial_model(load_any(config, ONE_STEP), agreement).state_dict()
    for name, first in start.items():
        expected = two[name] - 0.5 * 3.0 * (one[name] - first)
        torch.testing.assert_close(held[name], expected, atol=1e-6, rtol=1e-4)
    moved = (held["network.0.weight"] - two["network.0.weight"]).abs().max()
    assert moved > 1e-5, "without the term the weights would be the same"


def test_the_server_steps_from_the_weights_that_the_sites_began_with(
    reconstructing, phantoms: Path, tmp_path: Path
) -> None:
    config = reconstructing("stepped_family", "torch.nn.Identity()")
    weights = {}
    for name, optimizer in {
        "plain": None, "whole": {"name": "sgd", "momentum": 0.0},
        "half": {"name": "sgd", "momentum": 0.0, "lr": 0.5},
    }.items():  # fmt: skip
        simulate(config, phantoms, tmp_path / name, num_rounds=1, server_optimizer=optimizer,
                 overrides=ONE_STEP)  # fmt: skip
        weights[name] = load_file(tmp_path / name / "artifact" / "weights.safetensors")
    agreement = recorded_agreement(tmp_path / "plain")
    start = initial_model(load_any(config, ONE_STEP), agreement).state_dict()
    for name, average in weights["plain"].items():
        torch.testing.assert_close(weights["whole"][name], average, atol=1e-7, rtol=0)
        torch.testing.assert_close(weights["half"][name], (start[name] + average) / 2)
    with pytest.raises(FederationError, match=r"server_optimizer.lr: Input should be greater"):
        simulate(config, phantoms, tmp_path / "no", server_optimizer={"name": "sgd", "lr": 0})


@pytest.mark.slow
def test_the_server_keeps_the_moving_average_and_sites_send_half_as_much(
    tiny_config, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str, average: str) -> Path:
        simulate(tiny_config(), phantoms, tmp_path / name, average=average, average_decay=0.1,
                 overrides=EXACT)  # fmt: skip
        return tmp_path / name

    server = run("server", "server")
    sent = [server / "sites" / f"site-{number}" / "update.safetensors" for number in (1, 2)]
    first = load_file(server / "moving-average-1.safetensors")
    updates = [load_file(path) for path in sent]
    final = load_file(server / "artifact" / "weights.safetensors")
    for name, update in updates[0].items():
        second = (update.double() + updates[1][name].double()) / 2
        expected = 0.1 * first[name] + 0.9 * second
        torch.testing.assert_close(
            final[name.removeprefix("averaged.")].double(), expected, atol=1e-6, rtol=1e-6
        )
    moved = max((first[name] - updates[0][name]).abs().max() for name in first)
    assert moved > 1e-4, "the second round changed nothing"
    other = run("sites", "sites") / "sites" / "site-1" / "update.safetensors"
    assert sent[0].stat().st_size < 0.55 * other.stat().st_size

    trained = Site.train_round

    def killed(site: Site, agreement: Agreement, number: int, average: Path | None) -> Path:
        if number == 2:
            raise KeyboardInterrupt
        return trained(site, agreement, number, average)

    with monkeypatch.context() as patch:
        patch.setattr(Site, "train_round", killed)
        with pytest.raises(KeyboardInterrupt):
            run("killed", "server")
    assert_same(load_file(run("killed", "server") / "artifact" / "weights.safetensors"), final)


def test_batch_norms_are_averaged_and_their_counters_are_not(
    reconstructing, phantoms: Path, tmp_path: Path
) -> None:
    config, run = reconstructing("batch_family", "torch.nn.BatchNorm2d(4)"), tmp_path / "run"
    simulate(config, phantoms, run, num_rounds=2, overrides=ONE_STEP)
    weights = load_file(run / "artifact" / "weights.safetensors")
    sent = [load_file(run / "sites" / f"site-{number}" / "update.safetensors") for number in (1, 2)]
    mean = torch.stack([update["averaged.network.1.running_mean"] for update in sent]).mean(dim=0)
    torch.testing.assert_close(weights["network.1.running_mean"], mean)
    assert not any("num_batches_tracked" in name for name in sent[0])
    assert weights["network.1.num_batches_tracked"] == 2


@pytest.mark.slow
def test_sites_scale_latents_by_what_all_of_them_have(
    tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    config, run = tiny_config("latent_diffusion"), tmp_path / "run"
    without_split = "data.validation_fraction=0"
    simulate(config, phantoms, run, num_rounds=2, overrides=[without_split])
    overrides = [without_split, "training.max_epochs=1"]
    train(config, phantoms, tmp_path / "central", overrides=overrides)
    central = checkpoints.weights(tmp_path / "central" / "checkpoints" / "last.ckpt")
    federated = load_file(run / "artifact" / "weights.safetensors")
    for name in ("latent_mean", "latent_std"):
        torch.testing.assert_close(federated[name], central[name], rtol=1e-5, atol=1e-6)
    sent = load_file(run / "sites" / "site-1" / "update.safetensors")
    assert not any("first_stage" in name for name in sent)
    assert_same(
        {name: value for name, value in federated.items() if name.startswith("first_stage.")},
        {name: value for name, value in central.items() if name.startswith("first_stage.")},
    )


@pytest.mark.slow
def test_kills_at_many_changes_lose_nothing(
    tiny_config, phantoms: Path, tmp_path: Path, kills
) -> None:
    config, run = tiny_config(), tmp_path / "run"

    def work() -> None:
        simulate(config, phantoms, run, num_rounds=2, overrides=EXACT)

    work()
    expected = load_file(run / "artifact" / "weights.safetensors")
    shutil.move(run, tmp_path / "undisturbed")
    path, number, rounds_done = run / "average.safetensors", 30, []
    while not kills.killed_before(number, run, work):  # each goes on where the last one died
        rounds_done.append(read_update(path).header.round if path.exists() else 0)
        number += 60
    assert {0, 1} <= set(rounds_done), rounds_done
    assert_same(load_file(run / "artifact" / "weights.safetensors"), expected)
    before = (run / "average.safetensors").read_bytes()
    work()
    assert (run / "average.safetensors").read_bytes() == before


REFUSED = {
    "vqvae": ("model.name=vqvae", "model.name vqvae: the codes of its codebook"),
    "code_prior": ("model.name=code_prior", "model.name code_prior: it learns the codes"),
    "early stop": ("training.early_stop={}", "training.early_stop: a site must not stop alone"),
    "devices": ("compute.num_devices=2", "compute.num_devices and num_nodes: a site trains in one"),
}


@pytest.mark.parametrize(("override", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_averaged_is_refused_by_name(
    override: str, message: str, phantoms: Path, tmp_path: Path
) -> None:
    with pytest.raises(FederationError, match=message):
        simulate({}, phantoms, tmp_path / "run", overrides=[override])
    assert not (tmp_path / "run").exists()


def test_a_folder_continues_only_its_own_plan(tiny_config, phantoms: Path, tmp_path: Path) -> None:
    config, run = tiny_config(), tmp_path / "run"
    simulate(config, phantoms, run, num_rounds=1)
    with pytest.raises(ConfigError, match=r"rounds: was 1, is 2"):
        simulate(config, phantoms, run, num_rounds=2)
    with pytest.raises(ConfigError, match=r"config.seed: was 0, is 7"):
        simulate(config, phantoms, run, num_rounds=1, overrides=["seed=7"])
    other = write_phantoms(tmp_path / "other", num=8, size=(16, 16))
    with pytest.raises(ConfigError, match="begun on other images"):
        simulate(config, other, run, num_rounds=1)
    (tmp_path / "taken" / "sites").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"is no federation, .* \(sites\)"):
        simulate(config, phantoms, tmp_path / "taken")
    with pytest.raises(OutputError, match=r"is a federation \(federation.json\)"):
        train(config, phantoms, run)
    with pytest.raises(ConfigError, match="Give both a config and data"):
        simulate(None, phantoms, run)


@pytest.mark.parametrize("text", ["Age", "=0,1", "Age=1", "Age=2,1", "Age=0,inf", "Age=1,2,3"])
def test_a_range_that_cannot_be_read_is_refused(cli, text: str, tmp_path: Path) -> None:
    code, _, err = cli("federate", "simulate", "-o", tmp_path / "run", "--range", text)
    assert (code, f"{text}: write it as Age=0,100" in err) == (2, True)
    assert not (tmp_path / "run").exists()
