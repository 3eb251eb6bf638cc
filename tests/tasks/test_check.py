"""Check: faults that are found before a training."""

from __future__ import annotations

from pathlib import Path

from synthcube.data.phantom import write_phantoms


def test_check_reports_data_and_needs(cli, tiny_config, phantoms: Path) -> None:
    code, out, err = cli("check", "-c", tiny_config(), "-d", phantoms)
    assert code == 0, err
    assert "images: 12 of 12 subjects, all readable and of one shape" in out
    assert "size: 16 x 16, 1 channel(s)" in out
    assert "classes: {'disc': 4, 'square': 4, 'ring': 4}" in out
    for word in ("memory: about", "disk: about", "length: 4 steps in 2 epochs", "Ready to train."):
        assert word in out


def test_check_finds_faults_of_config_and_data_together(cli, tmp_path: Path) -> None:
    config = tmp_path / "bad.yaml"
    config.write_text("training: {batch: 1}")
    manifest = tmp_path / "bad.csv"
    manifest.write_text("Channel_0\nnowhere.png\n")
    code, _, err = cli("check", "-c", config, "-d", manifest)
    assert code == 2
    assert "training.batch" in err
    assert "nowhere.png" in err


def test_a_batch_that_cannot_be_shared_is_found(cli, tiny_config, phantoms, tmp_path) -> None:
    asked = ["--set", "compute.num_devices=3"]
    for command in (["check"], ["train", "-o", tmp_path / "run"]):
        code, _, text = cli(*command, "-c", tiny_config(), "-d", phantoms, *asked)
        assert code == 2
        assert "training.batch_size is 4, which 3 processes" in text
        assert "cannot share evenly: use 3 or 6." in text


def test_sizes_that_do_not_fit_the_model_stop_before_training(
    cli, tiny_config, tmp_path: Path
) -> None:
    data = write_phantoms(tmp_path / "odd", num=4, size=(17, 16))
    for command in (["check"], ["train", "-o", tmp_path / "run"]):
        code, _, err = cli(*command, "-c", tiny_config(), "-d", data)
        assert code == 2
        assert "data.size [17, 16]: every side must be a multiple of 2" in err
    assert not (tmp_path / "run" / "config.yaml").exists()
