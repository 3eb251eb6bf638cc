"""What long work shows: a bar on a terminal, lines in a log; Ctrl-C and colours."""

from __future__ import annotations

import csv
import importlib
import io
import logging
import re
import sys
import threading
from pathlib import Path

import pytest

from synthcube import environment, interruption, reading, terminal
from synthcube.data.phantom import write_phantoms
from synthcube.errors import EvaluationError
from synthcube.tasks.train import train

CONTROL = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|([\r\n])")
COLOUR = re.compile(r"\x1b\[(?:\d+;)*[39]\d[;m]")
BAR = "\N{BOX DRAWINGS HEAVY HORIZONTAL}"


def screen(written: str) -> tuple[list[str], bool]:
    """The lines of a terminal that got this, and whether its cursor is shown."""
    lines, row, column, is_shown, place = [""], 0, 0, True, 0
    for control in CONTROL.finditer(written):
        text = written[place : control.start()]
        lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + len(text) :]
        column, place = column + len(text), control.end()
        number, code, motion = control.groups()
        if motion == "\r":
            column = 0
        elif motion == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif code == "K":
            lines[row] = ""
        elif code == "A":
            row -= int(number)
        elif number == "?25":
            is_shown = code == "h"
        else:
            assert code == "m", control
    return [line.rstrip() for line in lines if line.strip()], is_shown


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantoms(tmp_path_factory.mktemp("data"), num=12, size=(16, 16)).parent


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.slow
def test_a_training_on_a_terminal_and_in_a_log(
    tiny_config, data: Path, tmp_path: Path, forks
) -> None:
    words = ["train", "-c", tiny_config(), "-d", data, "--set", "training.max_epochs=3", "-o"]
    code, written = forks.watched(*words, tmp_path / "watched")
    lines, is_shown = screen(written)
    assert code == 0
    assert re.search(rf"Preprocessing.*{BAR}.* 0 of 12", written)
    bar = rf"Training.*{BAR}.* 4 of 6  0:00:0\d left  epoch 2/3  loss \d\.\d{{4}}  [\d.]+ images/s"
    assert re.search(bar, written), written
    assert COLOUR.search(written)
    assert is_shown
    assert not [line for line in lines if BAR in line]
    epochs = [line for line in lines if line.startswith("epoch")]
    assert [line[:11] for line in epochs] == [f"epoch {i}/3  " for i in (1, 2, 3)]
    assert all(" train/loss " in line and " left" not in line for line in epochs)
    assert lines[-1].startswith("Trained model: ")
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")

    done = forks.command(*words, tmp_path / "logged")
    assert done.returncode == 0
    assert "\x1b" not in done.stderr + done.stdout
    assert "\r" not in done.stderr
    line = r"epoch 2/3  step 4  loss \d.*  [\d.]+ images/s  .* GB  0:00:0\d left\n"
    assert re.search(line, done.stderr), done.stderr
    assert re.search(r"epoch 2/3  .*train/loss .*  0:00:0\d left\n", done.stderr)
    assert BAR not in done.stderr

    for name in ("watched", "logged"):
        with (tmp_path / name / "metrics.csv").open() as table:
            epochs = [row["epoch"] for row in csv.DictReader(table)]
        assert sorted(set(epochs)) == ["1", "2", "3"]
        assert epochs == sorted(epochs)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model."""
    from synthcube.models import registry

    folder = tmp_path_factory.mktemp("run") / "run"
    model = registry.find("rectified_flow").tiny().model_dump(mode="json")
    config = {"model": model, "training": {"max_epochs": 1}, "compute": {"accelerator": "cpu"}}
    train(config, data, folder)
    return folder


def test_ctrl_c_leaves_a_clean_screen_and_one_message(
    tiny_config, data: Path, run: Path, tmp_path: Path, forks
) -> None:
    words = ["train", "-c", tiny_config(), "-d", data, "-o", tmp_path / "run"]
    words += ["--set", "training.max_epochs=500", "--set", "training.sample_every_n_epochs=0"]
    code, written = forks.watched(*words, ctrl_c_at="epoch 3/500  ")
    lines, is_shown = screen(written)
    assert code == 75
    assert lines[-1].startswith("stopped: SIGINT came in epoch ")
    assert "Saved as" in lines[-1]
    assert [line for line in lines if BAR in line or "Detected KeyboardInterrupt" in line] == []
    assert is_shown

    words = ["infer", "-m", run, "-o", tmp_path / "images", "-n", 100_000, "--batch_size", 2]
    code, written = forks.watched(*words, ctrl_c_at=" left  ")
    lines, is_shown = screen(written)
    assert code == 130
    assert re.search(rf"Making images.*{BAR}.* of 100,000", written)
    assert lines[-1].endswith("stopped: Ctrl-C.")
    assert "Traceback" not in written
    assert [line for line in lines if BAR in line] == []
    assert is_shown


def test_ctrl_c_during_an_import_removes_the_bar(forks, tmp_path: Path) -> None:
    (tmp_path / "slow_library.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"
    )

    def work() -> None:
        interruption.guard_start(["infer"])
        sys.path.insert(0, str(tmp_path))
        with terminal.Progress("Making images", 2):
            importlib.import_module("slow_library")

    code, written = forks.on_terminal(work)
    lines, is_shown = screen(written)
    assert (code, is_shown) == (130, True)
    assert "Making images" in written
    assert lines == ["stopped: Ctrl-C came while SynthCube was starting."]


@pytest.mark.slow
def test_colours_are_where_the_terminal_has_them(data: Path, tmp_path: Path, forks) -> None:
    words = ["check", "-c", tmp_path / "missing.yaml", "-d", data]
    shown = {
        name: forks.watched(*words, **changes)
        for name, changes in (
            ("colour", {}), ("none", {"NO_COLOR": "1"}), ("dumb", {"TERM": "dumb"})
        )
    }  # fmt: skip
    assert {code for code, _ in shown.values()} == {2}
    assert "\x1b[31merror: " in shown["colour"][1]
    assert shown["none"][1].startswith("error: ")
    assert not COLOUR.search(shown["none"][1] + shown["dumb"][1])
    assert "\x1b" not in shown["dumb"][1]
    assert "\x1b" not in forks.command(*words).stderr


def test_a_verdict_is_green_and_yellow(data: Path, tmp_path: Path, forks) -> None:
    words = ["evaluate", "-p", data, "-l", data, "-o", tmp_path / "results.yaml"]
    code, written = forks.watched(*words)
    lines, _ = screen(written)
    assert code == 0, written
    assert "\x1b[32mWhat is good about these images: " in written
    assert "\x1b[33mWhat is not: " in written
    sections = {
        "fidelity",
        "fidelity_by_class",
        "diversity",
        "paired",
        "memorisation",
        "usefulness",
    }
    answers = len(sections & set(reading.read_yaml(tmp_path / "results.yaml", EvaluationError)))
    totals = {"Reading predictions": 12, "Features of labels": 12, "Comparing": answers}
    for title, total in totals.items():
        assert re.search(rf"{title}.*{BAR}.* of {total}\b", written), title
    assert [line for line in lines if BAR in line] == []


def test_lines_in_a_log_come_ever_more_rarely(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    with caplog.at_level(logging.INFO, "synthcube"):
        for _ in terminal.followed(range(36_000), 36_000, "Reading images"):
            now += 1.0  # 10 hours
        for _ in terminal.followed("ab", 2, "Quick work"):
            now += 0.1
        with terminal.Progress("Silent", 2, has_lines=False) as progress:
            now += 3600
            progress.advance()
    # Threads of a test before may still log.
    own = [record for record in caplog.records if record.thread == threading.get_ident()]
    lines = [record.getMessage() for record in own]
    assert lines[0] == "Reading images: 5 of 36,000, 1.0 images/s, 9:59:55 left"
    assert 20 < len(lines) < 60
    assert {line.split(":")[0] for line in lines} == {"Reading images"}


def test_speed_and_time_left_are_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    with terminal.Progress("Training", unit="step") as bar:
        assert (bar.share, bar.speed, bar.time_left()) == ("0", "", [])
        bar.begin(900, 1000)
        assert bar.time_left() == []
        now = 40.0
        bar.advance(20)
        assert bar.speed == "2.0 s/step"
        assert bar.time_left() == ["0:02:40 left"]
        bar.ends_at = 100.0
        assert bar.time_left() == ["0:01:00 left"]
        now = 41.0
        bar.advance(62)
        assert bar.speed == "2.0 steps/s"
    assert terminal.clock(3723.4) == "1:02:03"


def test_only_the_first_process_draws_and_inner_work_takes_the_place_of_outer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stderr = Terminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "")
    monkeypatch.setenv("COLUMNS", "60")  # a bar that does not fit must stay one line
    log = logging.getLogger("synthcube")
    environment.open_log()
    log.setLevel(logging.WARNING)  # as in every other process
    assert list(terminal.followed("ab", 2, "Elsewhere")) == ["a", "b"]
    log.setLevel(logging.INFO)
    with terminal.Progress("Outer work", 2, "part") as outer:
        for letter in terminal.followed("abc", 3, "Inner [work]"):
            log.warning("careful with %s", letter)
        outer.advance()
        outer.facts = "much to say " * 9
        outer.draw()
    lost = terminal.followed("ab", 2, "Left behind")
    next(lost)
    terminal.clear()
    terminal.print_line("after", "red", to_stderr=True)
    written = stderr.getvalue()
    lines, is_shown = screen(written)
    assert lines == ["careful with a", "careful with b", "careful with c", "after"]
    assert is_shown
    assert "Elsewhere" not in written
    titles = re.findall(r"Outer work|Inner \[work\]|Left behind", written)
    assert list(dict.fromkeys(titles)) == ["Outer work", "Inner [work]", "Left behind"]
    assert re.search(r"1 of 2  0:00:00 left  much", written)
    assert "\x1b[33mcareful with a" in written
    assert "\x1b[31mafter" in written
