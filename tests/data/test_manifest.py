from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from synthcube.data.manifest import (
    Manifest,
    Row,
    image_suffix,
    read_manifest,
    read_table,
    write_manifest,
)
from synthcube.errors import ManifestError, OutputError


def listed(folder: Path, text: str | bytes, *images: str) -> Path:
    """A CSV with `text`, and empty files in the place of images."""
    for image in images:
        path = folder / image
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    path = folder / "list.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def faults(path: Path) -> str:
    with pytest.raises(ManifestError, match="fault") as caught:
        read_manifest(path)
    return str(caught.value)


def test_full_csv(tmp_path: Path) -> None:
    path = listed(
        tmp_path,
        "Channel_1,Channel_0,SubjectID,Label,LabelMapping,Split,Age\n"
        "b1.png,sub/a1.nii.gz,s1,1,tumour,train,41\n"
        f"{tmp_path}/b2.png,sub/a2.nii.gz,s2,0,healthy,,\n",
        *("b1.png", "b2.png", "sub/a1.nii.gz", "sub/a2.nii.gz"),
    )
    manifest = read_manifest(path)
    assert manifest.labels == ("healthy", "tumour")
    first, second = manifest.rows
    assert first == Row(
        (tmp_path / "sub/a1.nii.gz", tmp_path / "b1.png"),
        *("s1", 1, "tumour", "train", {"Age": "41"}, 2),
    )
    assert second.channels[1] == tmp_path / "b2.png"
    assert (second.split, second.conditions["Age"], second.number) == ("", "", 3)
    assert hash(first) != hash(second)


def test_relative_path_of_csv_gives_absolute_channels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed(tmp_path, "Channel_0\na.png\n", "a.png")
    monkeypatch.chdir(tmp_path)
    assert read_manifest(Path("list.csv")).rows[0].channels == (tmp_path / "a.png",)


def test_byte_order_mark_windows_lines_spaces_and_empty_lines(tmp_path: Path) -> None:
    text = b"\xef\xbb\xbfChannel_0,SubjectID\r\n a.png ,x\r\n\r\n,\r\n\r\n"
    rows = read_manifest(listed(tmp_path, text, "a.png")).rows
    assert [(row.channels[0].name, row.subject) for row in rows] == [("a.png", "x")]


def test_rows_without_subject_are_their_own(tmp_path: Path) -> None:
    rows = read_manifest(listed(tmp_path, "Channel_0\na.png\na.png\n", "a.png")).rows
    assert len({row.subject for row in rows}) == 2
    assert len({row.name for row in rows}) == 2
    assert rows[0].label == -1


@pytest.mark.parametrize(
    ("header", "cells", "labels", "ids"),
    [
        ("LabelMapping", ["type10", "type2", "type10"], ("type2", "type10"), [1, 0, 1]),
        ("Label", ["b", "a", "7"], ("7", "a", "b"), [2, 1, 0]),
        ("Label", ["2", "0", "2"], ("0", "1", "2"), [2, 0, 2]),
        ("Label", ["1.0", "0.0", "1.0"], ("0", "1"), [1, 0, 1]),
        ("Label,LabelMapping", ["1,y", "0,x", "1,y"], ("x", "y"), [1, 0, 1]),
        ("Label", ["", "", ""], (), [-1, -1, -1]),
    ],
)
def test_labels(
    tmp_path: Path, header: str, cells: list[str], labels: tuple[str, ...], ids: list[int]
) -> None:
    body = "".join(f"a.png,{cell}\n" for cell in cells)
    manifest = read_manifest(listed(tmp_path, f"Channel_0,{header}\n{body}", "a.png"))
    assert manifest.labels == labels
    assert [row.label for row in manifest.rows] == ids


def test_folder_with_manifest(tmp_path: Path) -> None:
    listed(tmp_path, "Channel_0\na.png\n", "a.png", "b.png").rename(tmp_path / "manifest.csv")
    assert len(read_manifest(tmp_path).rows) == 1


def test_plain_folder(tmp_path: Path) -> None:
    listed(
        tmp_path,
        "not read",
        *("scan10.PNG", "scan2.nii.gz", "b/x.tif", ".hidden.png", ".cache/y.png", "notes.txt"),
    )
    manifest = read_manifest(tmp_path)
    assert [row.subject for row in manifest.rows] == ["b/x", "scan2", "scan10"]
    assert [row.name for row in manifest.rows] == ["00001-b_x", "00002-scan2", "00003-scan10"]
    assert manifest.labels == ()


def test_folder_without_images_names_the_suffixes(tmp_path: Path) -> None:
    (tmp_path / "a.dcm").touch()
    with pytest.raises(ManifestError, match=r"no manifest\.csv and no image.*\.nii\.gz.*\.png"):
        read_manifest(tmp_path)


def test_missing_path(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"nowhere does not exist; a CSV or a folder"):
        read_manifest(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is empty: it holds nothing"),
        (b"Channel_0,Label\n\n", "is empty: it holds only a header"),
        (b"image,label\na.png,1\n", "no column Channel_0 .* its columns are: image, label"),
        (b"image;label\na.png;1\n", "its columns are: image, label.* --column Channel_0=ITS_NAME"),
        (b"\x1f\x8b\x08cut", "is a damaged gzip file"),
        (b"Channel_0,Channel_2\na.png,a.png\n", "but Channel_1 is missing"),
        (b"Channel_1\na.png\n", "but Channel_0 is missing"),
        (b"Channel_0,Age,Age\na.png,1,1\n", "the column 'Age' is there twice"),
        (b"Channel_0,split\na.png,test\n", "'split' should be spelled 'Split'"),
        (b"\x89PNG\r\n\x1a\n\0\0", "is not text in UTF-8"),
        (b"Channel_0\n\0a.png\n", "is binary, not text"),
        ("Channel_0\nä.png\n".encode("latin-1"), "is not text in UTF-8"),
        (b'Channel_0\n"a.png"x\n', "is not a valid CSV"),
    ],
)
def test_unusable_csv(tmp_path: Path, text: bytes, message: str) -> None:
    with pytest.raises(ManifestError, match=f"list.csv .*{message}|{message}"):
        read_manifest(listed(tmp_path, text, "a.png"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Channel_0\nb.png\n", "row 2, column Channel_0: .*b.png is missing"),
        ("Channel_0\na.dcm\n", "row 2, column Channel_0: a.dcm is not a known image; .*nii"),
        ("Channel_0\nd.png\n", "row 2, column Channel_0: .*d.png is not a file"),
        ("Channel_0,Age\n,3\n", "row 2, column Channel_0: the cell is empty"),
        ("Channel_0,SubjectID\na.png,\n", "row 2, column SubjectID: the cell is empty"),
        ("Channel_0,Age\na.png\n", "row 2: 1 cells, but the header has 2"),
        ("Channel_0,Label\na.png,1\na.png,\n", "row 3, column Label: the cell is empty"),
        ("Channel_0,Label\na.png,-2\n", "row 2, column Label: '-2' is not a class id"),
        ("Channel_0,Label\na.png,99999\n", "'99999' is not a class id; .* below 10000"),
        ("Channel_0,Label,LabelMapping\na.png,x,y\n", "'x' is not a class id"),
        ("Channel_0,Split\na.png,val\n", "'val' is not known; use train, validation, test"),
        (
            "Channel_0,SubjectID,Split\na.png,s,train\na.png,s,test\n",
            "subject 's' is in several splits: test, train",
        ),
        (
            "Channel_0,Label,LabelMapping\na.png,0,x\na.png,0,y\n",
            "row 3: label 0 is named 'y', but in row 2 label 0 is named 'x'",
        ),
        (
            "Channel_0,Label,LabelMapping\na.png,0,x\na.png,1,x\n",
            "row 3: label 1 is named 'x', but in row 2 label 0 is named 'x'",
        ),
    ],
)
def test_faulty_row(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "d.png").mkdir()
    path = listed(tmp_path, text, "a.png")
    with pytest.raises(ManifestError, match=f"(?s)has 1 fault:.*{message}"):
        read_manifest(path)


def test_all_faults_at_once(tmp_path: Path) -> None:
    text = faults(listed(tmp_path, "Channel_0,Split\nb.png,x\na.png,\n,train\n", "a.png"))
    assert "3 faults" in text
    assert all(part in text for part in ("b.png is missing", "'x' is not known", "row 4"))


def test_many_faults_are_capped(tmp_path: Path) -> None:
    text = faults(listed(tmp_path, "Channel_0\n" + "gone.png\n" * 50))
    assert "50 faults" in text
    assert text.count("gone.png") == 20
    assert text.endswith("and 30 more")


def test_write_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "manifest.csv"
    (tmp_path / "a, b.png").touch()
    write_manifest(path, [{"Channel_0": "a, b.png"}, {"Channel_0": "a, b.png", "Note": 'x"y'}])
    assert b"\r" not in path.read_bytes()
    assert [row.conditions["Note"] for row in read_manifest(path).rows] == ["", 'x"y']
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a, b.png", "manifest.csv"]


def test_write_refuses_no_rows_and_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no rows to write"):
        write_manifest(tmp_path / "m.csv", [])
    with pytest.raises(OutputError, match="Cannot write"):
        write_manifest(tmp_path / "no" / "m.csv", [{"Channel_0": "a.png"}])


def test_names_are_safe() -> None:
    assert Row((), subject="../a b/ü:*", number=7).name == "00007-a_b"
    assert Row((), subject="...").name == "00000-image"
    assert image_suffix(Path("A.NII.GZ")) == ".nii.gz"
    assert Manifest(Path(), (Row((), "s", 2, "c"),)).labels == ("0", "1", "c")


def test_the_cells_of_a_row_are_read_as_that_row(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    row = Row((tmp_path / "a.png",), "s1", 0, "cat", "test", {"Age": "3"}, number=2)
    write_manifest(tmp_path / "list.csv", [row.cells])
    assert read_manifest(tmp_path / "list.csv").rows == (row,)


@pytest.mark.parametrize("mark", [",", ";", "\t"])
@pytest.mark.parametrize("name", ["list.csv", "list.tsv", "list.csv.gz"])
def test_separators_and_packed_tables(tmp_path: Path, mark: str, name: str) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    lines = [["Channel_0", '"Age, in years; or not"', "Site"], ["a.png", "61", '"A;B,C"']]
    content = "\ufeff" + "\n".join(mark.join(cells) for cells in lines)
    packed = gzip.compress(content.encode()) if name.endswith(".gz") else content.encode()
    (tmp_path / name).write_bytes(packed)
    row = read_manifest(tmp_path / name).rows[0]
    assert row.channels == (tmp_path / "a.png",)
    assert row.conditions == {"Age, in years; or not": "61", "Site": "A;B,C"}


@pytest.mark.parametrize(
    ("name", "text", "columns"),
    [
        ("all.tsv", "participant_id\tnote (a, b, c)\nx\ty\n", ("participant_id", "note (a, b, c)")),
        ("all.csv", 'participant_id,"a; b; c"\nx,y\n', ("participant_id", "a; b; c")),
        ("all.csv", "id;age, years;sex\nx;y;z\n", ("id", "age, years", "sex")),
        ("all.csv", "Label\nx\n", ("Label",)),
    ],
)
def test_other_marks_in_a_header_separate_nothing(
    tmp_path: Path, name: str, text: str, columns: tuple[str, ...]
) -> None:
    (tmp_path / name).write_text(text)
    assert read_table(tmp_path / name).header == columns


def test_a_packed_table_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("synthcube.data.tables.MAX_LIST_BYTES", 1 << 20)
    (tmp_path / "list.csv.gz").write_bytes(gzip.compress(b"Channel_0\n" + b"a" * (1 << 21)))
    with pytest.raises(ManifestError, match=r"list\.csv\.gz unpacks to more than 1 MB"):
        read_manifest(tmp_path / "list.csv.gz")
