"""What a user can get wrong, or means ill: each ends with exit code 2 and a sentence."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

LONG, DEEP = "n" * 300, "/".join(["folder"] * 1000)
BYTES = os.fsdecode(b"caf\xe9")
ESCAPE, BELL, TURNED, NUL = "\x1b[31mred", "bell\a", "gnp\u202etxt.", "a\0b"
STRANGE = {
    "empty": "", "long": LONG, "deep": DEEP, "bytes": BYTES, "escape": ESCAPE, "bell": BELL,
    "turned": TURNED, "nul": NUL, "file": "FILE", "below a file": "FILE/x", "loop": "LOOP",
}  # fmt: skip


class Place:
    """A folder with what the commands need, and with what they should not be given."""

    def __init__(self, folder: Path, config: Path, data: Path) -> None:
        self.folder = folder
        (folder / "file").write_text("nothing of use\n")
        (folder / "full").mkdir()
        (folder / "full" / "file").touch()
        (folder / "loop").symlink_to(folder / "loop")
        (folder / "empty").mkdir()
        self.words = {
            "CONFIG": str(config), "DATA": str(data), "OUT": str(folder / "out"),
            "FILE": str(folder / "file"), "FULL": str(folder / "full"),
            "DIR": str(folder / "empty"), "LOOP": str(folder / "loop"),
            "FILE/x": str(folder / "file" / "x"),
            "CSV": str(data / "manifest.csv"),
        }  # fmt: skip

    def filled(self, words: tuple[str, ...]) -> list[str]:
        return [self.words.get(word, word) for word in words]


@pytest.fixture
def place(tmp_path: Path, tiny_config, phantoms: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    (tmp_path / "place").mkdir()
    monkeypatch.chdir(tmp_path / "place")
    return Place(tmp_path / "place", tiny_config(), phantoms)


@pytest.fixture
def refused(cli, place: Place) -> Callable[..., str]:
    """Runs a command that must be refused; returns what it says."""

    def run(*words: str) -> str:
        code, out, err = cli(*place.filled(words))
        said = out + err
        assert code == 2, (words, code, said)
        assert "Traceback" not in said, words
        assert said.strip(), words
        hidden = {
            character
            for character in said
            if character != "\n" and unicodedata.category(character)[0] == "C"
        }
        assert not hidden, (words, hidden)
        said.encode()
        assert len(said) < 10_000, words
        return said

    return run


# What is put in the place of X, in each of these, are the paths above.
PLACES: dict[str, tuple[str, ...]] = {
    "train config": ("train", "-c", "X", "-d", "DATA", "-o", "OUT"),
    "train data": ("train", "-c", "CONFIG", "-d", "X", "-o", "OUT"),
    "train output": ("train", "-c", "CONFIG", "-d", "DATA", "-o", "X"),
    "train resume": ("train", "-c", "CONFIG", "-d", "DATA", "-o", "OUT", "--resume", "X"),
    "train plugins": ("train", "-c", "CONFIG", "-d", "DATA", "-o", "OUT", "--plugins", "X"),
    "check config": ("check", "-c", "X", "-d", "DATA"),
    "check data": ("check", "-c", "CONFIG", "-d", "X"),
    "infer model": ("infer", "-m", "X", "-o", "OUT"),
    "evaluate predictions": ("evaluate", "-p", "X", "-l", "DATA", "-o", "OUT"),
    "evaluate labels": ("evaluate", "-p", "DATA", "-l", "X", "-o", "OUT"),
    "evaluate train": ("evaluate", "-p", "DATA", "-l", "DATA", "-t", "X", "-o", "OUT"),
    "evaluate model": ("evaluate", "-p", "DATA", "-l", "DATA", "-m", "X", "-o", "OUT"),
    "evaluate config": ("evaluate", "-p", "DATA", "-l", "DATA", "-c", "X", "-o", "OUT"),
    "prepare data": ("prepare", "-d", "X", "-o", "OUT"),
    "prepare output": ("prepare", "-d", "DATA", "-o", "X"),
    "export model": ("export", "-m", "X", "-o", "OUT"),
    "package model": ("package", "-m", "X", "-o", "OUT"),
    "import weights": ("import", "X", "--family", "ddpm", "-c", "CONFIG", "-o", "OUT"),
    "import config": ("import", "FILE", "--family", "ddpm", "-c", "X", "-o", "OUT"),
    "specs": ("specs", "--write", "X"),
    "medperf demo": ("medperf", "demo", "-o", "X", "-n", "2"),
    "medperf prepare": (
        "medperf", "prepare", "--data_path", "X", "--labels_path", "DATA", "--output_path", "OUT",
        "--output_labels_path", "FULL",
    ),
    "medperf check": ("medperf", "sanity_check", "--data_path", "X", "--labels_path", "X"),
    "medperf statistics": (
        "medperf", "statistics", "--data_path", "X", "--labels_path", "X", "--output_path", "OUT",
    ),
    "medperf infer": (
        "medperf", "infer", "--data_path", "DATA", "--additional_files", "X", "--output_path",
        "OUT",
    ),
    "medperf evaluate": (
        "medperf", "evaluate", "--predictions", "X", "--labels", "DATA", "--output_path", "OUT",
    ),
}  # fmt: skip
FINE = {("medperf demo", "file"), ("medperf demo", "loop")}
"""A file, or a link that leads nowhere, is written over."""


@pytest.mark.parametrize(
    ("where", "kind"), [case for case in product(PLACES, STRANGE) if case not in FINE]
)
def test_a_strange_path(where: str, kind: str, refused: Callable[..., str]) -> None:
    refused(*(STRANGE[kind] if word == "X" else word for word in PLACES[where]))


INFER = ("infer", "-m", "FULL", "-o", "OUT")
TRAIN = ("train", "-c", "CONFIG", "-d", "DATA", "-o", "OUT")
SETTINGS = [
    "", "=", "x", "seed", "seed=", "seed=²", "seed=-1", "seed=[", "seed={", "seed=<<",
    "seed==", "seed=0x_", "seed=0b_", f"seed={'9' * 5000}", "seed=\ud800", 'seed="\\ud800"',
    'seed="\\0"', 'model.name="\\e[31m"', 'model.name="a\\0b"', "model=3", "model.name=[1]",
    "model.name={a: b}", "model.<<={a: 1}", "<<={seed: 1}", "data={<<: {size: [8, 8]}}",
    "data={[1]: 2}", "data={? {a: 1} : 2}", "data={~: 1}", "data.size=[²]", "data=&a [1]",
    "data=*a", "data=!!python/name:os.system", "..=1", "a..b=1", f"{'a.' * 50}b=1",
    "training.start_from=" + LONG, 'training.start_from="a\\0b"', 'training.start_from="\\udcff"',
    "training.start_from=" + DEEP, "training.start_from=/", "seed=2023-01-01", "seed=.nan",
]  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS, ids=range(len(SETTINGS)))
def test_a_strange_setting(setting: str, refused: Callable[..., str]) -> None:
    refused(*TRAIN, "--set", setting)


OTHERS: list[tuple[str, ...]] = [
    ("nothing",), ("\x1b[31m",), ("train", ESCAPE), ("--\x1b[31m",), (*INFER, "--no\x07"),
    ("init", ESCAPE), ("init", "²"), ("init", "--dims", "²"), ("init", "--dims", "4"),
    ("init", LONG), ("init", ""), ("medperf", "demo", "-o", "OUT", "--size", "²x²"),
    ("medperf", "demo", "-o", "OUT", "--size", ""), ("medperf", "demo", "-o", "OUT", "-n", "²"),
    ("medperf", "demo", "-o", "OUT", "--size", "9" * 5000),
    (*INFER, "--seed", "²"), (*INFER, "--seed", "-1"), (*INFER, "--batch_size", "²"),
    ("prepare", "-d", "DATA", "-o", "OUT", "--test", "²"),
    ("prepare", "-d", "DATA", "-o", "OUT", "--test", "nan"),
    ("prepare", "-d", "DATA", "-o", "OUT", "--test", "0.9", "--validation", "0.9"),
    ("prepare", "-d", "DATA", "-o", "OUT", "--channels", "[" * 500),
    ("import", "FILE", "--family", "ddpm", "-c", "CONFIG", "-o", "FILE"),
    ("import", "DIR", "--family", "ddpm", "-c", "CONFIG", "-o", "OUT"),
    ("specs", "--write", "OUT", "--image", "a\nrun_args: --privileged"),
    ("specs", "--write", "OUT", "--image", 'a"b'), ("specs", "--write", "OUT", "--image", ""),
    ("specs", "--write", "OUT", "--image", "a b"), ("specs", "--write", "OUT", "--image", "-v"),
    ("train", "-c", "CONFIG", "-c", "CONFIG", "-d", "DATA", "-o", "OUT"),
    ("train", "-c", "CONFIG", "-c", LONG, "-d", "DATA", "-o", "OUT"),
    ("train", "-c", "DIR", "-d", "DATA", "-o", "OUT"),
    ("evaluate", "-p", "DATA", "-l", "DATA", "-o", "DIR"),
    ("evaluate", "-p", "DATA", "-l", "DATA", "-o", "OUT", "--report", "FILE"),
    ("infer", "-m", "hf://\u202e/x", "-o", "OUT"), ("infer", "-m", "hf://a/b@../..", "-o", "OUT"),
    ("infer", "-m", "hf:", "-o", "OUT"), ("infer", "-m", f"hf://a/{LONG}", "-o", "OUT"),
]  # fmt: skip


@pytest.mark.parametrize("words", OTHERS, ids=range(len(OTHERS)))
def test_strange_words(words: tuple[str, ...], refused: Callable[..., str]) -> None:
    refused(*words)


@pytest.fixture(scope="module")
def trained(first_stage) -> str:
    return str(first_stage("rectified_flow"))


COUNTS = ["²", "Hand=²", "0", "-1", "1.5", "nan", "", "=", "Hand=", "=3", "a=1,a=2", "a=1,b=²",
          "9" * 5000, "Hand=" + "9" * 5000, "1e3", "٣", "1,2", "\x1b[31m", "\ud800"]  # fmt: skip


@pytest.mark.parametrize("count", COUNTS, ids=range(len(COUNTS)))
def test_strange_counts(count: str, trained: str, refused: Callable[..., str]) -> None:
    refused("infer", "-m", trained, "-o", "OUT", "-n", count)


MORE = [
    ("--condition", ""), ("--condition", "="), ("--condition", "Age=²"), ("--condition", "a=b"),
    ("--conditions", "FILE"), ("--conditions", "DIR"), ("--conditions", LONG), ("-d", "FILE"),
    ("-d", "DIR"), ("-d", BYTES), ("-c", "DIR"), ("-c", "FILE"), ("--runtime", "²"),
    ("--license", "\x1b"), ("--license", "x y"), ("--croissant", "--license", "x y"),
    ("--croissant", "--license", "<script>"), ("--croissant", "--creator", ESCAPE),
]  # fmt: skip


@pytest.mark.parametrize("words", MORE, ids=range(len(MORE)))
def test_strange_words_for_a_model(
    words: tuple[str, ...], trained: str, refused: Callable[..., str]
) -> None:
    refused("infer", "-m", trained, "-o", "OUT", *words)


@pytest.mark.parametrize("kind", list(STRANGE))
@pytest.mark.parametrize("command", ["infer", "export", "package"])
def test_strange_outputs_for_a_model(
    command: str, kind: str, trained: str, refused: Callable[..., str]
) -> None:
    refused(command, "-m", trained, "-o", STRANGE[kind])


SHARED = [
    ("--notes", LONG), ("--notes", "DIR"), ("--notes", BYTES), ("--evaluation", LONG),
    ("--evaluation", "FILE"), ("--evaluation", "DIR"), ("--license", "<b>"), ("--license", "a\nb"),
    ("--dataset", "[x](y)"), ("--dataset", "a b"), ("--model_version", "²"),
    ("--model_version", "1.0\n"), ("--push_to", "²"), ("--push_to", "a/b"), ("-c", "FILE"),
    ("--runtime", "²"), ("--runtime_weights", "²"), ("--push_to", "../..", "--license", "mit"),
]  # fmt: skip


@pytest.mark.parametrize("words", SHARED, ids=range(len(SHARED)))
def test_strange_words_for_an_export(
    words: tuple[str, ...], trained: str, refused: Callable[..., str]
) -> None:
    refused("export", "-m", trained, "-o", "OUT", *words)


IMAGES = ["", "a\nb", 'a"b', "a'b", "A/B", "a b", "a:", ":a", "a@sha256:1", "a: b", "a #b", "{a}",
          "$(id)", "../a", "a" * 300, "\x1b[31m", "a:b:c", "https://a/b"]  # fmt: skip


@pytest.mark.parametrize("image", IMAGES, ids=range(len(IMAGES)))
def test_strange_images(image: str, trained: str, refused: Callable[..., str]) -> None:
    refused("package", "-m", trained, "-o", "OUT", "--image", image)


TABLES = {
    "nul": b"Channel_0\na\0.png\n", "escape": b"Channel_0,Label\n00.png,\x1b[31mred\n",
    "bytes": b"Channel_0\ncaf\xe9.png\n", "long": b"Channel_0\n" + b"n" * 5000 + b".png\n",
    "turned": "Channel_0\ngnp\u202e.png\n".encode(), "quote": b'Channel_0\n"a.png\n',
    "empty": b"", "huge field": b"Channel_0\n" + b"n" * 200_000 + b"\n",
    "twice": b"Channel_0,Channel_0\na,b\n", "gap": b"Channel_0,Channel_2\na,b\n",
    "digits": "Channel_0,Label\n00.png,²\n00.png,\n".encode(),
    "utf16": "Channel_0\n".encode("utf-16"),
}  # fmt: skip


@pytest.mark.parametrize("kind", TABLES)
def test_strange_tables(kind: str, place: Place, refused: Callable[..., str]) -> None:
    path = place.folder / "list.csv"
    path.write_bytes(TABLES[kind])
    refused("train", "-c", "CONFIG", "-d", str(path), "-o", "OUT")


CONFIGS = {
    "merge": "base: {seed: 1}\n<<: {seed: 2}\n", "merge below": "data:\n  <<: {size: [8, 8]}\n",
    "merge list": "<<: [{seed: 1}, {seed: 2}]\n", "escape": 'seed: "\\e[31m"\n',
    "key": '"\\e[31m": 1\n', "nul": 'data: {size: "\\0"}\n',
    "surrogate": 'model: {name: "\\udcff"}\n',
    "list key": "? [a]\n: 1\n", "value": "seed: =\n", "hex": "seed: 0x_\n",
    "long": f"training: {{start_from: {LONG}}}\n", "control": "seed: \x01\n",
    "turned": "\u202eseed: 1\n", "number key": "1: 2\n", "null": "~: 1\n",
}  # fmt: skip


@pytest.mark.parametrize("command", ["train", "check"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_strange_configs(
    kind: str, command: str, place: Place, refused: Callable[..., str]
) -> None:
    path = place.folder / "strange.yaml"
    path.write_text(CONFIGS[kind], encoding="utf-8")
    output = ("-o", "OUT") if command == "train" else ()
    said = refused(command, "-c", str(path), "-d", "DATA", *output)
    assert kind[:5] != "merge" or "merge keys (<<) are not allowed" in said


@pytest.mark.parametrize("name", [b"caf\xe9.png", b"\x1b[31m.png", b"a\nb.png", b"a\tb.png"])
def test_strange_names_of_images(
    name: bytes, cli, phantoms: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    folder = tmp_path / "strange"
    folder.mkdir()
    picture = next(phantoms.rglob("*.png")).read_bytes()
    (folder / "good.png").write_bytes(picture)
    Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(picture)
    assert "names that cannot be used" in refused("check", "-c", "CONFIG", "-d", str(folder))
    code, out, _ = cli("prepare", "-d", folder, "-o", tmp_path / "list.csv")
    assert code == 0
    assert "1 images of 1 subjects" in out
    assert "Left out" in out
    assert not {"\x1b", "\t", "\udce9"} & set(out)


def test_a_working_folder_that_is_not_utf8(
    cli, tiny_config, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config()
    folder = tmp_path / BYTES
    folder.mkdir()
    phantoms.rename(folder / "data")
    monkeypatch.chdir(folder)
    code, out, err = cli("train", "-c", config, "-d", "data", "-o", "run")
    assert code == 2
    assert "not UTF-8" in err
    assert "\udce9" not in out + err
    assert not (folder / "run" / "split.csv").exists()


def test_names_of_others_give_no_orders_in_the_log(
    cli, tmp_path: Path, tiny_config, phantoms: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from synthcube import environment

    environment.open_log()
    environment.log.warning("%s is here", "\x1b[31mred\r\u202e")
    assert capsys.readouterr().err == "\\x1b[31mred\\r\\u202e is here\n"


def test_an_empty_text_that_is_no_path_is_none(cli, trained: str, tmp_path: Path) -> None:
    words = ("--license", "", "--push_to=", "--revision", "", "--set")
    code, _, err = cli("export", "-m", trained, "-o", tmp_path / "model", *words[:-1])
    assert code == 0, err
