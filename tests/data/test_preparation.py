from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from synthcube.data.manifest import read_manifest
from synthcube.data.preparation import prepare
from synthcube.errors import ManifestError


def tree(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"" if "empty" in name else b"x")
    return root


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def reasons(done: Any) -> dict[str, str]:
    return {path.name: reason for path, reason in done.left_out}


def test_unlabeled_subjects_and_loose_images(tmp_path: Path) -> None:
    root = tree(tmp_path / "data", "s10/a.png", "s2/b.png", "s2/deep/a.png", "x.nii.gz")
    done = prepare(root, tmp_path / "out")
    assert done.manifest_path == tmp_path / "out" / "manifest.csv"
    assert table(done.manifest_path) == [
        {"Channel_0": "../data/s2/b.png", "SubjectID": "s2"},
        {"Channel_0": "../data/s2/deep/a.png", "SubjectID": "s2"},
        {"Channel_0": "../data/s10/a.png", "SubjectID": "s10"},
        {"Channel_0": "../data/x.nii.gz", "SubjectID": "x"},
    ]
    assert (done.rows, done.subjects, done.labels, done.splits) == (4, 3, {}, {})
    assert len(read_manifest(done.manifest_path).rows) == 4


def test_channels_keep_their_order_whatever_the_names(tmp_path: Path) -> None:
    root = tree(
        tmp_path / "data",
        *("p1/p1_T2.nii.gz", "p1/p1_t1.nii.gz", "p1/p1_t1ce.nii.gz"),
        *("p2/a-T1.nii", "p2/b-t2.nii", "p2/c-t1ce.nii"),
    )
    done = prepare(root, tmp_path, channels=["t2", "T1"])
    assert [[row["Channel_0"], row["Channel_1"]] for row in table(done.manifest_path)] == [
        ["data/p1/p1_T2.nii.gz", "data/p1/p1_t1.nii.gz"],
        ["data/p2/b-t2.nii", "data/p2/a-T1.nii"],
    ]
    assert reasons(done) == {
        "p1_t1ce.nii.gz": "matches no channel",
        "c-t1ce.nii": "matches no channel",
    }


@pytest.mark.parametrize(
    ("pattern", "name", "fits"),
    [
        ("t1", "sub_T1.png", True),
        ("t1", "sub_t1ce.png", False),
        ("t1", "t1-sub.png", True),
        ("t1", "1t1.png", False),
        ("t1_ce", "sub-t1_ce.png", True),
        ("t1*", "t1ce.png", True),
        ("*t1??", "sub_t1ce.png", True),
        ("*.nii.gz", "a.nii.gz", True),
        ("t?", "sub_t1.png", False),
        ("nii", "a.nii.gz", False),
        # as GaNDLF-Synth's -ch: the end of a name, with its suffix
        ("t1.nii.gz", "sub_T1.nii.gz", True),
        ("_t1.nii.gz", "sub_t1.nii.gz", True),
        ("t1.nii.gz", "sub_t1ce.nii.gz", False),
        ("t1.nii.gz", "t1.nii", False),
        ("_t1", "sub_t1.png", True),
        ("_t1", "sub_t1ce.png", False),
    ],
)
def test_patterns(tmp_path: Path, pattern: str, name: str, fits: bool) -> None:
    root = tree(tmp_path / "data", f"s/{name}")
    if fits:
        assert prepare(root, tmp_path, channels=[pattern]).rows == 1
    else:
        with pytest.raises(ManifestError, match="has no file"):
            prepare(root, tmp_path, channels=[pattern])


def test_incomplete_subjects_are_left_out(tmp_path: Path) -> None:
    root = tree(
        tmp_path / "data",
        *("ok/t1.png", "ok/t2.png", "lacks/t1.png", "double/t1.png", "double/t2.png"),
        "double/x_t2.png",
    )
    done = prepare(root, tmp_path, channels=["t1", "t2"])
    assert [row["SubjectID"] for row in table(done.manifest_path)] == ["ok"]
    assert reasons(done) == {  # one line a subject, not one a file
        "lacks": "channel 't2' has no file",
        "double": "channel 't2' has 2 files (t2.png, x_t2.png)",
    }


def test_a_file_is_not_two_channels(tmp_path: Path) -> None:
    root = tree(tmp_path / "data", "s/t1_flair.png")
    with pytest.raises(ManifestError, match=r"t1_flair\.png matches several channels"):
        prepare(root, tmp_path, channels=["t1", "flair"])


def test_stray_files_are_left_out(tmp_path: Path) -> None:
    root = tree(
        tmp_path / "data",
        *("s/a.png", "s/.DS_Store", "s/._a.png", "s/Thumbs.db", "s/empty.png", "s/notes.txt"),
        *("__MACOSX/a.png", ".git/b.png"),
    )
    done = prepare(root, tmp_path)
    assert done.rows == 1
    told = reasons(done)
    assert told["empty.png"] == "empty (0 bytes)"
    assert told["notes.txt"].startswith("not a known image")
    assert {told[n] for n in (".DS_Store", "._a.png", "Thumbs.db", "a.png", "b.png")} == {
        "hidden or of the system"
    }


def test_patients_are_classes(tmp_path: Path) -> None:
    root = tree(tmp_path / "data", "p10/a.png", "p2/a.png", "p2/b.png", "loose.png")
    done = prepare(root, tmp_path, paradigm="patient")
    assert done.labels == {"p2": 2, "p10": 1}
    assert [(r["Label"], r["LabelMapping"]) for r in table(done.manifest_path)] == [
        *(("0", "p2"), ("0", "p2"), ("1", "p10"))
    ]
    assert reasons(done) == {"loose.png": "not in a folder of its own (layout: SUBJECT/images)"}


def test_custom_classes(tmp_path: Path) -> None:
    root = tree(tmp_path / "data", "b/s1/t1.png", "b/s2/t1.png", "A/x.png", "A/s1/t1.png", "y.png")
    done = prepare(root, tmp_path, paradigm="custom")
    rows = [(r["SubjectID"], r["Label"], r["LabelMapping"]) for r in table(done.manifest_path)]
    assert rows == [("A/x", "0", "A"), ("s1", "0", "A"), ("s1", "1", "b"), ("s2", "1", "b")]
    assert read_manifest(done.manifest_path).labels == ("A", "b")
    assert list(reasons(done)) == ["y.png"]


def test_split_by_subject_and_class(tmp_path: Path) -> None:
    names = [f"{label}/s{label}{i}/{n}.png" for label in "ab" for i in range(10) for n in range(2)]
    root = tree(tmp_path / "data", *names)
    done = prepare(root, tmp_path, paradigm="custom", validation=0.2, test=0.1, seed=3)
    assert done.splits == {"train": 28, "validation": 8, "test": 4}
    assert {(row["Label"], row["Split"]) for row in table(done.manifest_path)} == {
        (label, split) for label in "01" for split in ("train", "validation", "test")
    }
    read_manifest(done.manifest_path)  # no subject in two splits
    before = done.manifest_path.read_bytes()
    prepare(root, tmp_path, paradigm="custom", validation=0.2, test=0.1, seed=3)
    assert done.manifest_path.read_bytes() == before
    prepare(root, tmp_path, paradigm="custom", validation=0.2, test=0.1, seed=4)
    assert done.manifest_path.read_bytes() != before


def test_out_may_be_a_csv_or_the_folder_itself(tmp_path: Path) -> None:
    root = tree(tmp_path / "data", "s/a.png")
    assert prepare(root, tmp_path / "new" / "list.csv").manifest_path.name == "list.csv"
    assert sorted(p.name for p in root.rglob("*")) == ["a.png", "s"]
    for _ in range(2):
        done = prepare(root, root)
        assert done.left_out == ()
        assert table(root / "manifest.csv") == [{"Channel_0": "s/a.png", "SubjectID": "s"}]


def test_paths_through_a_linked_folder(tmp_path: Path) -> None:
    tree(tmp_path / "a" / "b" / "data", "s/a.png")
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b")
    done = prepare(tmp_path / "link" / "data", tmp_path / "link" / "out")
    assert read_manifest(done.manifest_path).rows[0].channels[0].is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": ["t1", "T1"]}, "channel 1: the pattern 'T1' is there already"),
        ({"channels": [""]}, "channel 0: the pattern is empty"),
        ({"validation": 0.7, "test": 0.7}, "validation 0.7, test 0.7 cannot be split off"),
        ({"validation": -0.1}, "cannot be split off"),
        ({"paradigm": "patient"}, r"(?s)layout: SUBJECT/images.*not in a folder of its own"),
    ],
)
def test_unusable_arguments(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        prepare(tree(tmp_path / "data", "a.png"), tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_missing_folder_and_nothing_left(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="nowhere does not exist"):
        prepare(tmp_path / "nowhere", tmp_path)
    root = tree(tmp_path / "data", *(f"empty{i}.png" for i in range(30)))
    with pytest.raises(ManifestError, match="no image that can be used") as caught:
        prepare(root, tmp_path)
    line = f"  - 30 times: empty (0 bytes): {root / 'empty0.png'}, "
    assert line in str(caught.value)
    assert str(caught.value).endswith("and 27 more")


BIDS = ["sub-01_ses-01_T1w.png", "sub-01_ses-02_T1w.png", "sub-02_T1w.png", "sub-03_T1w.png"]


def test_bids_names_state_the_subject(tmp_path: Path) -> None:
    root = tree(tmp_path / "data", *BIDS)
    done = prepare(root, tmp_path / "out")
    assert (done.rows, done.subjects, done.warning) == (4, 3, "")
    assert [row["SubjectID"] for row in table(done.manifest_path)] == [
        "sub-01", "sub-01", "sub-02", "sub-03"
    ]  # fmt: skip
    assert [row.subject for row in read_manifest(root).rows] == [
        "sub-01", "sub-01", "sub-02", "sub-03"
    ]  # fmt: skip
    # One name without a subject: nothing is guessed, and a warning says what it looks like.
    tree(root, "other.png")
    done = prepare(root, tmp_path / "other")
    assert done.subjects == 5
    assert done.warning.startswith(
        "the file names look like 3 people (sub-01, sub-02, sub-03), but they count as 4 subjects"
    )


def test_prepare_warns_of_several_files_of_a_person(cli: Any, tmp_path: Path) -> None:
    root = tree(tmp_path / "data", "p01_a.png", "p01_b.png", "p02_a.png", "p02_b.png")
    code, out, err = cli("prepare", "-d", root, "-o", tmp_path / "out")
    assert code == 0, err
    assert "Warning: the file names look like 2 people (p01, p02), but they count as 4" in out
    folders = tree(tmp_path / "folders", "p01/a.png", "p01/b.png", "p02/a.png", "p02/b.png")
    assert prepare(folders, tmp_path / "second").warning == ""


def channels_of(path: Path) -> list[tuple[str, ...]]:
    """The names of each row's channel files."""
    return [
        tuple(Path(cell).name for name, cell in row.items() if name.startswith("Channel_"))
        for row in table(path)
    ]


def test_nnunet(cli: Any, tmp_path: Path) -> None:
    images = [f"imagesTr/brain_{case}_000{channel}.nii.gz" for case in "123" for channel in "01"]
    root = tree(
        tmp_path / "Dataset001",
        *images,
        *("labelsTr/brain_1.nii.gz", "labelsTr/brain_2.nii.gz", "imagesTs/brain_9_0000.nii.gz"),
        "dataset.json",
    )  # fmt: skip
    done = prepare(root, tmp_path / "out")
    assert [row["SubjectID"] for row in table(done.manifest_path)] == ["brain_1", "brain_2"]
    assert channels_of(done.manifest_path)[0] == (
        "brain_1_0000.nii.gz", "brain_1_0001.nii.gz", "brain_1.nii.gz"
    )  # fmt: skip
    assert done.channels == ("0000", "0001", "mask")
    assert reasons(done) == {
        "dataset.json": reasons(done)["dataset.json"],
        "brain_3_0000.nii.gz": "channel 'mask' has no file",
        "brain_9_0000.nii.gz": "channel '0001' has no file; channel 'mask' has no file",
    }
    # Chosen channels; the mask is not asked for, so that the cases without one count.
    code, out, err = cli("prepare", "-d", root, "-o", tmp_path / "one", "--channels", "0000")
    assert code == 0, err
    assert "4 images of 4 subjects\nChannels: Channel_0 0000\n" in out


def test_medical_segmentation_decathlon(tmp_path: Path) -> None:
    names = [f"{part}/la_00{case}.nii.gz" for part in ("imagesTr", "labelsTr") for case in (3, 4)]
    done = prepare(tree(tmp_path / "data", *names), tmp_path / "out")
    assert done.channels == ("0000", "mask")
    assert [row["SubjectID"] for row in table(done.manifest_path)] == ["la_003", "la_004"]
    four_digits = [
        f"{part}/case_{n}.png" for part in ("imagesTr", "labelsTr") for n in ("0001", "0002")
    ]
    done = prepare(tree(tmp_path / "digits", *four_digits), tmp_path / "second")
    assert channels_of(done.manifest_path) == [("case_0001.png",) * 2, ("case_0002.png",) * 2]


def test_flat_files_with_a_suffix_for_each_channel(cli: Any, tmp_path: Path) -> None:
    names = [f"P{n}_{word}.png" for n in range(10) for word in ("T1", "t2", "seg")]
    root = tree(tmp_path / "data", *names, "p77_t1.png", "notes_page.png")
    code, out, err = cli("prepare", "-d", root, "-o", tmp_path / "out")
    assert code == 0, err
    assert (
        "10 images of 10 subjects\nChannels: Channel_0 t1, Channel_1 t2, Channel_2 seg (recognised"
        in out
    )
    assert f"Left out: {root / 'p77_t1.png'}: channel 't2' has no file; channel 'seg'" in out
    assert channels_of(tmp_path / "out" / "manifest.csv")[0] == (
        "P0_T1.png",
        "P0_t2.png",
        "P0_seg.png",
    )
    assert table(tmp_path / "out" / "manifest.csv")[0]["SubjectID"] == "P0"
    # What was recognised can be changed, and turned off.
    assert prepare(root, tmp_path / "two", channels=["seg", "t1"]).rows == 10
    assert prepare(root, tmp_path / "globs", channels=["*_T1*", "p*_se?"]).rows == 10
    code, out, _ = cli("prepare", "-d", root, "-o", tmp_path / "each", "--channels", "")
    assert code == 0
    assert "32 images of 32 subjects\n" in out
    assert "Warning: the file names look like" in out


@pytest.mark.parametrize(
    "names",
    [
        ["p1_left.png", "p1_right.png", "p2_left.png", "p2_right.png"],  # no modality
        ["p1_1.png", "p1_2.png", "p2_1.png", "p2_2.png"],
        ["p1_t1.png", "p2_t1.png", "p3_t2.png", "p4_t2.png"],  # nobody has both
        ["p1_t1.png", "p2_t1.png", "p3_t1.png", "p3_seg.png"],  # only few have both
        ["a/t1.png", "b/t1.png"],
    ],
)
def test_channels_are_not_guessed(tmp_path: Path, names: list[str]) -> None:
    done = prepare(tree(tmp_path / "data", *names), tmp_path / "out")
    assert (done.channels, done.rows) == ((), len(names))


def test_several_samples_of_a_subject(tmp_path: Path) -> None:
    root = tree(
        tmp_path / "data",
        *(f"p1/scan{n}_{word}.png" for n in (1, 2) for word in ("t1", "seg")),
        *(f"p2/visit{n}/{word}.png" for n in (1, 2) for word in ("t1", "seg")),
        *("p3/visit1/t1.png", "p3/visit1/seg.png", "p3/visit2/t1.png", "p3/visit2/map.png"),
        *("p4/scan1_t1.png", "p4/scan1_seg.png", "p4/scan2_seg.png"),  # two scans
        *("p5/p5_t1.png", "p5/p5_seg.png", "p5/p5_t1_seg.png"),  # which mask?
    )
    done = prepare(root, tmp_path / "out")
    rows = table(done.manifest_path)
    assert [(row["SubjectID"], row["Channel_0"][8:], row["Channel_1"][8:]) for row in rows] == [
        ("p1", "p1/scan1_t1.png", "p1/scan1_seg.png"),
        ("p1", "p1/scan2_t1.png", "p1/scan2_seg.png"),
        ("p2", "p2/visit1/t1.png", "p2/visit1/seg.png"),
        ("p2", "p2/visit2/t1.png", "p2/visit2/seg.png"),
        ("p3", "p3/visit1/t1.png", "p3/visit1/seg.png"),
        ("p4", "p4/scan1_t1.png", "p4/scan1_seg.png"),
    ]
    assert reasons(done) == {
        "t1.png": "channel 'seg' has no file",
        "map.png": "matches no channel",
        "scan2_seg.png": "channel 't1' has no file",
        "p5": "channel 'seg' has 2 files (p5_seg.png, p5_t1_seg.png)",
    }


def test_bids_with_sessions_and_participants(cli: Any, tmp_path: Path) -> None:
    root = tree(
        tmp_path / "data",
        *(
            f"sub-0{n}/ses-{when}/anat/sub-0{n}_ses-{when}_acq-{word}_run-1_{word}.nii.gz"
            for n in (1, 2)
            for when in ("pre", "post")
            for word in ("T1w", "FLAIR")
        ),
        "sub-03/anat/sub-03_run-1_T1w.nii.gz",
        "sub-03/anat/sub-03_run-1_FLAIR.nii.gz",
    )
    (root / "participants.tsv").write_text(
        "participant_id\tage\tgroup\tsplit\nsub-01\t61\tAD\ta\n02\tn/a\tCN\tb\n"
    )
    code, out, err = cli("prepare", "-d", root, "-o", tmp_path / "out", "--channels", "t1w,flair")
    assert code == 0, err
    assert "5 images of 3 subjects" in out
    assert "Columns: ses, run, age, group\n" in out
    assert "participants.tsv: the column split has a meaning in a manifest" in out
    rows = read_manifest(tmp_path / "out").rows
    assert [(row.subject, *row.conditions.values()) for row in rows] == [
        ("sub-01", "post", "1", "61", "AD"),
        ("sub-01", "pre", "1", "61", "AD"),
        ("sub-02", "post", "1", "", "CN"),
        ("sub-02", "pre", "1", "", "CN"),
        ("sub-03", "", "1", "", ""),
    ]
    # A mask whose name says what it was drawn on, in another folder, is one more channel.
    for n, when in (("1", "pre"), ("1", "post"), ("2", "pre"), ("2", "post")):
        tree(root, f"derivatives/m/sub-0{n}/sub-0{n}_ses-{when}_space-T1w_desc-x_dseg.nii.gz")
    done = prepare(root, tmp_path / "same")
    assert (done.channels, done.rows) == (("flair", "t1w"), 5)
    done = prepare(root, tmp_path / "same", derivatives=True)
    assert (done.channels, done.rows) == (("flair", "t1w", "dseg"), 4)
    assert reasons(done)["sub-03"] == "channel 'dseg' has no file"
    (root / "participants.tsv").write_text("participant_id\nsub-01\nsub-01\n")
    with pytest.raises(ManifestError, match="row 3: sub-01 is there twice"):
        prepare(root, tmp_path / "out")
    (root / "participants.tsv").write_text("id\nsub-01\n")
    with pytest.raises(ManifestError, match="no column participant_id; it has: id"):
        prepare(root, tmp_path / "out")


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    root = tree(tmp_path / "data", "p1/a.png", "p2/a.png")
    elsewhere = tree(tmp_path / "elsewhere", "b.png", "deep/c.png")
    (root / "p3").symlink_to(elsewhere)
    (root / "all").symlink_to(root)  # a circle
    (elsewhere / "up").symlink_to(root)
    (root / "a_twin").symlink_to(root / "p2")  # no second subject with the images of p2
    (root / "gone").symlink_to(tmp_path / "nowhere")
    expected = ["p1/a.png", "p2/a.png", "p3/b.png", "p3/deep/c.png"]
    done = prepare(root, root / "list.csv")
    assert [row["Channel_0"] for row in table(done.manifest_path)] == expected
    (root / "list.csv").unlink()
    plain = read_manifest(root).rows
    assert [str(row.channels[0].relative_to(root)) for row in plain] == expected


def test_many_faulty_cases_are_few_lines(cli: Any, tmp_path: Path) -> None:
    names = [
        f"p{n}/{word}{k}.png" for n in range(60) for word in ("a_t1_", "b_t1_") for k in range(9)
    ]
    root = tree(tmp_path / "data", *names)
    code, _, err = cli("prepare", "-d", root, "-o", tmp_path / "out", "--channels", "t1,t2")
    assert code == 2
    assert len(err) < 1000
    assert "60 times: channel 't1' has 18 files (a_t1_0.png, a_t1_1.png, a_t1_2.png, ...); " in err
    assert not (tmp_path / "out").exists()


def csv_of_images(root: Path) -> Path:
    tree(root, *(f"im/{n}_{word}.png" for n in range(4) for word in ("t1", "seg")))
    lines = [f"im/{n}_t1.png;im/{n}_seg.png;p{n // 2};{60 + n}" for n in range(4)]
    (root / "cohort.csv").write_text("\n".join(["t1_path;mask;patient;Age, years", *lines]))
    return root / "cohort.csv"


RENAMED = [
    *("--column", "Channel_0=t1_path", "--column", "Channel_1=mask"),
    *("--column", "SubjectID=patient", "--column", "Age=Age, years"),
]


def test_a_table_with_other_columns(cli: Any, tmp_path: Path) -> None:
    cohort = csv_of_images(tmp_path / "data")
    out = tmp_path / "out" / "list.csv"
    code, said, err = cli("prepare", "-d", cohort, "-o", out, *RENAMED, "--validation", "0.5")
    assert code == 0, err
    assert "4 images of 2 subjects\nColumns: Age\nSplits: " in said
    assert table(out)[0] == {
        "Channel_0": "../data/im/0_t1.png",
        "Channel_1": "../data/im/0_seg.png",
        "SubjectID": "p0",
        "Age": "60",
        "Split": table(out)[0]["Split"],
    }
    assert [row.conditions["Age"] for row in read_manifest(out).rows] == ["60", "61", "62", "63"]
    # Of one channel and no subject; an image that cannot be used is left out.
    code, said, err = cli(
        "prepare", "-d", cohort, "-o", tmp_path, "--column", "Channel_0=t1_path", "--verify"
    )
    assert code == 2
    assert "cohort.csv holds no image that can be used" in err
    code, said, err = cli("prepare", "-d", cohort, "-o", tmp_path, "--column", "Channel_0=mask")
    assert code == 0, err
    assert "SubjectID" not in table(tmp_path / "manifest.csv")[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--column", "Channel_0=t1"], "--column Channel_0=t1: there is no column 't1'"),
        (["--column", "Channel_0"], "--column Channel_0: write it as in Channel_0=t1_path"),
        (["--column", "A=mask", "--column", "A=patient"], "--column names one column twice"),
        (["--column", "A=mask", "--column", "B=mask"], "'mask' is renamed twice"),
        (["--column", "patient=mask"], "there is a column 'patient' already"),
        (["--column", "Channel_0=patient"], "row 2, column Channel_0: p0 is not a known image"),
        ([], "has no column Channel_0"),
        (["--channels", "t1"], "--channels and --paradigm are for folders of images"),
        (["--paradigm", "custom"], "--channels and --paradigm are for folders of images"),
        (
            ["--column", "Channel_0=mask", "--column", "Split=patient"],
            "column Split: 'p0' is not known",
        ),
    ],
)
def test_unusable_columns(cli: Any, tmp_path: Path, options: list[str], message: str) -> None:
    cohort = csv_of_images(tmp_path / "data")
    code, _, err = cli("prepare", "-d", cohort, "-o", tmp_path / "out", *options)
    assert code == 2
    assert message in err
    assert not (tmp_path / "out").exists()


def test_columns_of_a_folder_and_a_second_split(tmp_path: Path) -> None:
    cohort = csv_of_images(tmp_path / "data")
    with pytest.raises(ManifestError, match="--column renames the columns of a CSV"):
        prepare(cohort.parent, tmp_path / "out", columns={"Channel_0": "a"})
    cohort.write_text("Channel_0,Split\nim/0_t1.png,train\n")
    with pytest.raises(ManifestError, match="has a column Split already"):
        prepare(cohort, tmp_path / "out", validation=0.5)
    assert prepare(cohort, tmp_path / "out").splits == {"train": 1}
