"""The help of every command, and the completion of their names in a shell."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from synthcube.cli import app

FRAME = re.compile(r"[\N{BOX DRAWINGS LIGHT HORIZONTAL}-\N{BOX DRAWINGS LIGHT ARC UP AND RIGHT}]")
PANEL = re.compile("\N{BOX DRAWINGS LIGHT ARC DOWN AND RIGHT}. ([\\w ]+) ")


def commands(group: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command and group, with its words."""
    yield words, group
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*words, name))


PYTHON_PATH = {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
ALL = dict(commands(get_command(app)))


def prose(text: str) -> str:
    """The text without its frames and line breaks."""
    return " ".join(FRAME.sub(" ", text).split())


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Typer colours help on a terminal, and where some CI runs."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_help_says_what_a_value_is_and_shows_an_example(words: tuple[str, ...], cli) -> None:
    command = ALL[words]
    code, shown, errors = cli(*words, "--help")
    assert (code, errors) == (0, "")
    assert not re.search("<[a-zA-Z]", shown)
    assert "..." not in shown.replace("[ARGS]...", "")
    assert prose(command.help) in prose(shown)
    for name, below in getattr(command, "commands", {}).items():
        assert f"{name} {prose(below.help)}" in prose(shown), "a whole summary"
    panels = PANEL.findall(shown)
    options = [parameter for parameter in command.params if parameter.opts[0].startswith("-")]
    assert len(panels) == len(set(panels))
    assert len(panels) >= (3 if len(options) > 7 else 2 if len(options) > 4 else 1)
    for option in options:
        assert option.opts[-1] in shown
        assert prose(option.help) in prose(shown)


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_an_example_is_a_command_that_can_be_given(words: tuple[str, ...]) -> None:
    example = ALL[words].epilog.removeprefix("Example: ")
    assert len(example) < 78, "on one line of a terminal"
    program, *rest = shlex.split(example.partition(" > ")[0])
    assert program == "synthcube"
    assert tuple(rest[: len(words)]) == words
    named = max((known for known in ALL if tuple(rest[: len(known)]) == known), key=len)
    ALL[named].make_context("synthcube", rest[len(named) :])


def completed(words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "synthcube"], capture_output=True, text=True, check=True,
        env={**PYTHON_PATH, "_SYNTHCUBE_COMPLETE": "complete_bash", "COMP_WORDS": words,
             "COMP_CWORD": str(len(words.split()) - 1)},
    )  # fmt: skip
    return done.stdout


def test_names_are_completed() -> None:
    assert completed("synthcube ex").split() == ["export"]
    assert completed("synthcube infer --gui").split() == ["--guidance"]
    assert "sanity_check" in completed("synthcube medperf s")


@pytest.mark.skipif(not shutil.which("bash"), reason="bash is not on this machine")
def test_a_shell_completes_once_that_is_installed(tmp_path: Path) -> None:
    scripts = Path(sys.executable).parent
    environment = {"HOME": str(tmp_path), "PATH": f"{scripts}:/usr/bin:/bin", **PYTHON_PATH}

    def bash(script: str) -> str:
        done = subprocess.run(
            ["bash", "--norc", "-c", script], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    shown = bash("synthcube --show-completion; true")
    assert "complete -o default -F _synthcube_completion synthcube" in shown
    assert "bash completion installed" in bash("synthcube --install-completion; true")
    assert ".bash_completions/synthcube.sh" in (tmp_path / ".bashrc").read_text()
    words = "COMP_WORDS=(synthcube tr); COMP_CWORD=1; _synthcube_completion synthcube"
    source = "source ~/.bash_completions/synthcube.sh"
    assert bash(f"{source}; {words}; echo ${{COMPREPLY[@]}}") == "train\n"
