"""The page and the table of cases, read back, and images as the page shows them."""

from __future__ import annotations

import base64
import csv
import io
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from synthcube.escapes import printable
from synthcube.evaluation.report import page as report_page
from synthcube.evaluation.report import plots
from synthcube.evaluation.report.page import CASES, PAGE, write_report
from synthcube.evaluation.report.text import number, spoken
from synthcube.evaluation.results import Measure, Picture, Plot, Section, missing, upright


def marked(shape: tuple[int, ...], *places: tuple[int, ...]) -> np.ndarray:
    image = np.zeros(shape, np.float32)
    for place in places:
        image[place] = 10
    return image


def test_pictures_run_down_and_others_up() -> None:
    image = marked((1, 4, 3), (0, 3, 0))  # x = 3, y = 0
    shown = upright(image, [(0, 10)], raster=True)
    assert shown.shape == (3, 4)
    assert shown[0, 3] == 1
    assert upright(image, [(0, 10)], raster=False)[2, 3] == 1


def test_three_channels_are_colours_and_two_stand_side_by_side() -> None:
    assert upright(np.zeros((3, 4, 5)), [(0, 1)] * 3, raster=True).shape == (5, 4, 3)
    image = marked((2, 4, 5), (1, 0, 0))
    shown = upright(image, [(0, 5), (0, 20)], raster=True)
    assert shown.shape == (5, 8)
    assert shown[0, 4] == 0.5  # in the range of its own channel


def test_a_volume_is_three_slices_with_the_head_up() -> None:
    volume = marked((1, 4, 6, 8), (0, 2, 3, 7))  # in the middle of x and y, at the top of z
    shown = upright(volume, [(0, 10)], raster=False)
    axial, coronal, sagittal = 4 * 8 / 6, 4, 6  # of one height, in proportion
    assert shown.shape == (8, round(axial) + coronal + sagittal)
    assert [tuple(place) for place in np.argwhere(shown)] == [(0, 5 + 1), (0, 5 + 4 + 2)]


def test_voxels_are_as_large_as_they_are() -> None:
    volume = marked((1, 6, 6, 2), (0, 5, 3, 1))  # at the patient's right
    shown = upright(volume, [(0, 10)], raster=False, spacing_mm=(1, 1, 3))
    assert shown.shape == (6, 6 + 6 + 6)
    assert (shown[2, 0], shown[2, 5]) == (1, 0), "the right is on the left"
    assert (shown[:3, 6] == 1).all(), "a slice is three millimetres thick"
    assert (shown[3:, 6] == 0).all()


def test_what_is_beyond_the_range_is_clipped_and_a_constant_is_black() -> None:
    assert upright(np.full((1, 2, 2), 99.0), [(0, 10)], raster=True).max() == 1
    assert upright(np.full((1, 2, 2), 5.0), [(5, 5)], raster=True).max() == 0


HOSTILE = "<script>alert('x')</script>&\"'\x00\udcff\u202e|`.nii.gz"
VOID = {"meta", "link", "img"}


class Read(HTMLParser):
    """What a page holds; fails where a tag is not closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.append((self.open[-1], data))

    def all(self, *names: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag in names]

    def said(self, *names: str) -> list[str]:
        return [text for tag, text in self.texts if tag in names]


def sections() -> list[Section]:
    random = np.random.default_rng(0)
    fidelity = Section(
        "fidelity",
        {"frechet_distance": Measure(12.34567, 8.9, 11.2, 13.6, 200),
         "coverage": missing("8 images are fewer than 10"),
         "recall": Measure(float("nan"), count=3), "density": Measure(0.5, reason="few images")},
        ["One extractor."], {"num_features": 1280, "scale": 0.123456, "planes": {"axial": None}},
        [Plot("Distances", "histogram", {"a": random.normal(size=99).tolist(), "b": [0.0, 9.0]})],
        [Picture("Pairs", [[random.random((5, 7)).astype(np.float32)] * 2], ("made",), [["x"]])],
    )  # fmt: skip
    copies = Section(
        "memorisation",
        {"share_of_copies": Measure(0.05, 0.01, count=40)},
        ["The real baseline is that of held-out images.",
         "2 of 40 are near-copies at this threshold, subject-007 among them."],
        cases=[{"subject": "subject-007", "file": "/data/scan-7.png", "distance": 0.25},
               {"subject": "subject-008", "distance": float("nan"), "flip": None}],
    )  # fmt: skip
    return [fidelity, copies]


HEADER = {
    "extractor": {"name": "inception", "sha256": "ab12" * 16, "weights": "/home/x/inception.pt"},
    "images": {"predictions": {"count": 200, "shape": [1, 32, 32]}, "labels": {"count": 180}},
    "notes": ["3 images of labels are constant."],
    "seed": 1234567,
    "command": "synthcube evaluate --predictions /data/made",
    "settings": {"data": {"size": [32, 32], "resize": None}},
}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    write_report(tmp_path / "report", HEADER, sections())
    return tmp_path / "report"


def read(folder: Path) -> Read:
    return Read((folder / PAGE).read_text(encoding="utf-8"))


def hostile() -> Section:
    image = np.zeros((4, 4), np.float32)
    return Section(
        HOSTILE, {HOSTILE: Measure(1.0, reason=HOSTILE)}, [HOSTILE],
        {HOSTILE: {HOSTILE: [HOSTILE]}},
        [Plot(HOSTILE, "histogram", {HOSTILE: [1.0]}, HOSTILE, HOSTILE, lines={HOSTILE: 1.0}),
         Plot(HOSTILE, "bars", {HOSTILE: [1.0]}, HOSTILE, HOSTILE, (HOSTILE,))],
        [Picture(HOSTILE, [[image]], (HOSTILE,), [[HOSTILE]])], [{HOSTILE: HOSTILE}],
    )  # fmt: skip


def test_the_page_is_one_well_formed_file_that_asks_for_nothing(written: Path) -> None:
    page = read(written)
    assert page.all("html") == [{"lang": "en"}]
    assert not page.all("script", "iframe", "object", "embed", "base", "form")
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "srcset", "xlink:href", "data", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    text = (written / PAGE).read_text(encoding="utf-8")
    assert "http:" not in text
    assert "https:" not in text
    assert not re.search(r"@import|url\(", text)


def test_headings_are_in_order_and_links_lead_somewhere(written: Path) -> None:
    page = read(written)
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert {attributes["href"] for attributes in page.all("a")} == {f"#{anchor}" for anchor in ids}


def test_what_is_seen_can_be_read_aloud(written: Path) -> None:
    page = read(written)
    assert len(page.all("img")) == 2
    assert all(attributes["alt"] for attributes in page.all("img"))
    assert all(attributes["scope"] for attributes in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))
    for attributes in page.all("svg"):
        labelled = attributes.get("role") == "img" and attributes.get("aria-label")
        assert attributes.get("aria-hidden") == "true" or labelled


def test_the_summary_has_value_interval_baseline_count_and_reason(written: Path) -> None:
    texts = [text for tag, text in read(written).texts if tag in ("th", "td")]
    place = texts.index("Distance to real images (Frechet)")
    assert texts[place + 1 : place + 5] == ["12.35 (11.2 to 13.6)", "8.9", "↓ lower", "200"]
    place = texts.index("Coverage: share of real images with a generated one nearby")
    assert texts[place + 1 : place + 6] == [
        "none", "none", "↑ higher", "none", "No value: 8 images are fewer than 10",
    ]  # fmt: skip
    place = texts.index("Recall: share of real images that are within reach")
    assert texts[place + 1 : place + 6] == [
        "none", "none", "↑ higher", "3", "No value: the computation gave nan",
    ]  # fmt: skip
    assert "Read with care: few images" in texts
    place = texts.index("Share of copies")  # a measure that no label is known of
    assert texts[place - 1] == "The real baseline is that of held-out images."
    assert "3 images of labels are constant." in read(written).said("p")
    assert not any(text.lower() in ("nan", "inf", "none.") for text in texts)


def test_the_verdict_is_on_top_and_the_gallery_above_the_summary(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    rows = [[random.random((5, 7)).astype(np.float32)] * 4 for _ in range(2)]
    gallery = Picture("Beside real ones", rows, ("disc: generated", "disc: real"))
    header = HEADER | {"verdict": ["one", "two"]}
    write_report(tmp_path, header, sections(), gallery)
    page = read(tmp_path)
    sentences = [text for tag, text in page.texts if tag == "p" and text.startswith("What is ")]
    assert len(sentences) == 2
    assert "as a set, they differ from real images (Frechet distance 12.35" in sentences[1]
    texts = [text for _, text in page.texts]
    order = [texts.index(text) for text in (*sentences, "disc: real", "Summary", "How to read it")]
    assert order == sorted(order)
    assert not {"one", "two"} & set(texts), "the header's verdict stands at the top alone"
    assert page.all("img")[0]["alt"] == "disc: generated, image 1 of 4"
    assert len(page.all("img")) == 8 + 2


def test_the_baseline_is_said_to_be_a_ceiling_of_precision(written: Path) -> None:
    text = " ".join(read(written).said("li"))
    assert "for precision, recall, density and coverage it is a ceiling" in text
    assert "floor" not in (written / PAGE).read_text(encoding="utf-8").lower()


def test_the_page_promises_nothing(written: Path) -> None:
    text = (written / PAGE).read_text(encoding="utf-8")
    assert text.count("For research only") == 1
    assert not re.search(r"\b(private|safe|anonymous|passed)\b", text, re.IGNORECASE)
    assert "They say nothing about privacy" in text


def test_names_are_shown_and_do_nothing(tmp_path: Path) -> None:
    write_report(tmp_path, {HOSTILE: HOSTILE, "extractor": {"name": HOSTILE}}, [hostile()])
    page = read(tmp_path)
    assert not page.all("script")
    shown = printable(HOSTILE)
    assert {"h2", "p", "td", "li", "text", "figcaption"} <= {
        tag for tag, text in page.texts if shown[10:-10] in text
    }
    assert page.all("img")[0]["alt"] == f"{shown}, image 1 of 1: {shown}"
    assert HOSTILE[:30] not in (tmp_path / PAGE).read_text(encoding="utf-8")
    table = list(csv.reader(io.StringIO((tmp_path / CASES).read_text(encoding="utf-8"))))
    assert table == [["section", shown], [shown, shown]]


def test_only_the_first_rows_of_many_cases_are_shown(tmp_path: Path) -> None:
    section = Section("paired", cases=[{"case": f"c{i}", "psnr": i / 7} for i in range(1201)])
    write_report(tmp_path, {}, [section])
    page = read(tmp_path)
    shown = [text for text in page.said("th") if re.fullmatch(r"c\d+", text)]
    assert shown == [f"c{i}" for i in range(200)]
    assert any("first 200 of 1,201" in text for text in page.said("summary"))
    rows = list(csv.DictReader(io.StringIO((tmp_path / CASES).read_text(encoding="utf-8"))))
    assert len(rows) == 1201
    assert float(rows[-1]["psnr"]) == pytest.approx(1200 / 7, rel=1e-5)


def test_the_table_of_cases_has_every_column_and_no_nan(written: Path) -> None:
    rows = list(csv.DictReader(io.StringIO((written / CASES).read_text(encoding="utf-8"))))
    assert [row["section"] for row in rows] == ["memorisation"] * 2
    assert rows[0]["distance"] == "0.25"
    assert (rows[1]["distance"], rows[1]["flip"], rows[1]["file"]) == ("", "", "")


def test_a_second_report_takes_the_place_of_the_first(written: Path) -> None:
    (written / "notes.txt").write_text("mine")
    first = {path.name: path.read_bytes() for path in written.iterdir()}
    write_report(written, HEADER, sections())
    assert {path.name: path.read_bytes() for path in written.iterdir()} == first
    write_report(written, HEADER, [])
    assert sorted(path.name for path in written.iterdir()) == ["notes.txt", PAGE]


def test_a_fault_while_the_page_is_made_leaves_the_last_report(written: Path) -> None:
    first = {path.name: path.read_bytes() for path in written.iterdir()}
    wrong = Section("x", plots=[Plot("Bars", "bars", {"a": [1.0, 2.0]}, categories=("one",))])
    with pytest.raises(ValueError, match="2 bars of a, 1 categories"):
        write_report(written, HEADER, [wrong])
    assert {path.name: path.read_bytes() for path in written.iterdir()} == first


def test_bars_are_as_long_as_their_numbers() -> None:
    values = {"one": [1.0, 4.0, -2.0], "two": [0.5, float("nan"), 3.0]}
    plot = Plot("Bars", "bars", values, categories=("a", "b", "c"))
    page = Read(plots.figure(plot))
    bars = page.all("rect")
    widths = [float(bar["width"] or 0) for bar in bars]
    expected = np.array([1, 0.5, 4, 2, 3])
    np.testing.assert_allclose(widths / expected, widths[0], rtol=1e-3)
    starts = [float(bar["x"] or 0) for bar in bars]
    assert starts[3] + widths[3] == pytest.approx(starts[0], abs=0.02)  # -2 ends where 1 begins
    assert page.said("text").count("no number") == 1


def test_a_histogram_counts_every_number_once() -> None:
    random = np.random.default_rng(1)
    series = {"a": np.append(random.normal(size=500), np.nan), "b": random.normal(2, 1, 40)}
    edges, counts = plots.histogram(series, [9.0])
    assert counts.sum(axis=1).tolist() == [500, 40]
    assert edges[-1] == 9.0
    np.testing.assert_array_equal(counts[1], np.histogram(series["b"], edges)[0])
    numbers = {name: value.tolist() for name, value in series.items()}
    page = Read(plots.figure(Plot("H", "histogram", numbers, lines={"limit": 9.0})))
    assert page.said("li") == ["a (500; 1 are not numbers)", "b (40)", "limit: 9"]
    areas = [
        attributes["d"] or ""
        for attributes in page.all("path")
        if "area" in (attributes["class"] or "")
    ]
    for path, numbers in zip(areas, counts, strict=False):
        heights = [float(value) for value in re.findall(r"V([\d.]+)H", path)]
        bottom = float(path.rsplit("V", 1)[1])
        drawn = bottom - np.array(heights)
        np.testing.assert_allclose(drawn / drawn.sum(), numbers / numbers.sum(), atol=1e-3)
    line = next(attributes for attributes in page.all("path") if attributes["class"] == "line l0")
    right = max(float(value) for value in re.findall(r"H([\d.]+)", areas[0]))
    assert float(re.match(r"M([\d.]+)", line["d"] or "").group(1)) == pytest.approx(right)


@pytest.mark.parametrize("values", [[3.0], [0.0, 0.0], [1e-300, 2e-300], [-1e12, 1e12]])
@pytest.mark.parametrize("kind", ["histogram", "bars"])
def test_plots_of_odd_ranges_hold_finite_numbers(kind: str, values: list[float]) -> None:
    page = Read(plots.figure(Plot("Odd", kind, {"a": values}, categories=("c",) * len(values))))
    assert page.all("svg")
    assert not re.search(r"\b(nan|inf)\b", " ".join(str(attributes) for _, attributes in page.tags))


@pytest.mark.parametrize("kind", ["histogram", "bars"])
def test_a_plot_without_numbers_says_so(kind: str) -> None:
    for series in ({"a": [float("nan")]}, {}):
        page = Read(plots.figure(Plot("Empty", kind, series, categories=("c",) if series else ())))
        assert "No numbers to draw." in page.said("p")


@pytest.mark.parametrize("shape", [(5, 7), (64, 64, 3), (1, 1), (300, 400)])
def test_pictures_have_every_pixel(shape: tuple[int, ...]) -> None:
    image = np.random.default_rng(0).random(shape).astype(np.float32)
    image.flat[0] = np.nan
    uri = report_page.picture_rows(Picture("One", [[image]]))[0]["cells"][0]["uri"]
    assert uri.startswith("data:image/png;base64,")
    read_back = np.array(PIL.Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))
    expected = np.rint(255 * np.nan_to_num(image)).astype(np.uint8)
    np.testing.assert_array_equal(read_back, expected)


@pytest.mark.parametrize("shape", [(4,), (4, 4, 2), (0, 4), (2, 2, 2, 3)])
def test_a_picture_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(H, W\) or \(H, W, 3\) is needed"):
        report_page.png_uri(np.zeros(shape, np.float32))


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "none"), (float("inf"), "none"), (0.0, "0"), (-3.0, "-3"), (1.0, "1"),
     (0.99996, "1"), (0.9996, "0.9996"), (12.34567, "12.35"), (12345.67, "12,346"),
     (0.000012344, "0.00001234"), (1.5e-9, "1.5e-09"), (1e12, "1e+12"), (0.1 + 0.2, "0.3")],
)  # fmt: skip
def test_numbers_are_rounded_for_people(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("name", "text"),
    [("tpr_at_1_percent_fpr", "TPR at 1 percent FPR"), ("ms_ssim", "MS-SSIM"),
     ("num_neighbours", "Number of neighbours"), ("psnr_db", "PSNR (dB)"), ("", ""),
     ("frechet_distance", "Frechet distance")],
)  # fmt: skip
def test_names_are_written_out(name: str, text: str) -> None:
    assert spoken(name) == text


def test_colours_can_be_told_from_the_background() -> None:
    """WCAG 2.2: 4.5 to 1 for text, 3 to 1 for what is drawn."""
    css = (Path(plots.__file__).parent / "page.css").read_text(encoding="utf-8")
    schemes = [dict(re.findall(r"--(\w+): (#\w+);", part)) for part in css.split("@media")[:2]]
    assert all(len(scheme) == 12 for scheme in schemes)
    for scheme in schemes:
        for name, colour in scheme.items():
            needed = 4.5 if name in ("text", "quiet", "link") else 3
            if name not in ("back", "shade", "rule"):
                for behind in ("back", "shade"):
                    assert _contrast(colour, scheme[behind]) >= needed, (name, behind)


def _contrast(one: str, other: str) -> float:
    low, high = sorted(map(_luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * value for value in colour[1:])
    parts = np.array([int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)])
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])
