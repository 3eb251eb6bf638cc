"""The report in headless Chromium, offline: no request, no console message, nothing overlapping.

REQUIRE_TOOLS with `chromium` in it turns the skip on machines without one into a failure.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from synthcube.evaluation.report.page import PAGE, write_report
from synthcube.evaluation.results import Measure, Picture, Plot, Section, missing

pytestmark = pytest.mark.browser
NAMES = ("chromium", "chromium-browser", "google-chrome")
LONG = "a-very-long-file-name-without-any-space-" * 4 + '<script>alert("1")</script>&.nii.gz'
WATCHED = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
OVERLAPS = """(() => {
  const boxes = [...document.querySelectorAll('.grid > div')].map(e => e.getBoundingClientRect());
  const over = (a, b) => a.left < b.right - .5 && b.left < a.right - .5
    && a.top < b.bottom - .5 && b.top < a.bottom - .5;
  return boxes.flatMap((a, i) => boxes.slice(i + 1).filter(b => b.width && over(a, b))).length;
})()"""
TEXT_OUTSIDE = """(() => [...document.querySelectorAll('.plot > svg')].flatMap(svg => {
  const room = svg.getBoundingClientRect();
  return [...svg.querySelectorAll('text')].filter(e => {
    const box = e.getBoundingClientRect();
    return box.left < room.left - 1 || box.right > room.right + 1
      || box.top < room.top - 1 || box.bottom > room.bottom + 1;
  }).map(e => e.textContent);
}))()"""
BROKEN = "[...document.images].filter(e => !e.complete || !e.naturalWidth).length"
BEYOND = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


class Browser:
    """Chromium through a pair of pipes: the DevTools protocol, messages end with a NUL."""

    def __init__(self, program: str, profile: Path) -> None:
        to_read, self._out = os.pipe()
        self._in, to_write = os.pipe()
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{to_read} 4>&{to_write}', "bash", program,
             "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
             "--no-first-run", "--disable-background-networking", "--disable-component-update",
             "--disable-sync", "--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND",
             "--remote-debugging-pipe", f"--user-data-dir={profile}"],
            pass_fds=(to_read, to_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_read)
        os.close(to_write)
        self._rest, self._number = b"", 0
        self._session: dict[str, Any] = {}
        self.events: list[dict[str, Any]] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        answer = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": answer["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params, **self._session}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], 60)
            assert ready, "Chromium has said nothing for a minute"
            piece = os.read(self._in, 1 << 20)
            assert piece, "Chromium has ended"
            self._rest += piece
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def open(self, path: Path, width: int = 1280, scheme: str = "light", medium: str = "") -> None:
        """Shows the file, and forgets what was seen of others."""
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        self.ask("Emulation.setDeviceMetricsOverride", **size)
        wish = [{"name": "prefers-color-scheme", "value": scheme}]
        self.ask("Emulation.setEmulatedMedia", media=medium, features=wish)
        self.ask("Page.navigate", url="about:blank")
        self.value("document.readyState")
        self.events.clear()
        self.ask("Page.navigate", url=path.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())
        assert self.value("location.href") == path.as_uri()

    def value(self, expression: str) -> Any:
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def seen(self, method: str) -> list[dict[str, Any]]:
        return [event["params"] for event in self.events if event["method"] == method]

    def requests(self) -> list[str]:
        """What was asked for outside the page."""
        urls = [event["request"]["url"] for event in self.seen("Network.requestWillBeSent")]
        assert urls, "not even the page was asked for"
        return [url for url in urls[1:] if not url.startswith("data:")]

    def messages(self) -> list[dict[str, Any]]:
        return [event for method in WATCHED for event in self.seen(method)]

    def screenshot(self, path: Path) -> None:
        answer = self.ask("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    def close(self) -> None:
        self._session = {}
        self.ask("Browser.close")
        self._process.wait(timeout=30)
        os.close(self._in)
        os.close(self._out)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        if "chromium" in os.environ.get("REQUIRE_TOOLS", "").split(","):
            pytest.fail("chromium is required here and is not on PATH")
        pytest.skip("no chromium on PATH")
    opened = Browser(program, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with all that a section can hold, names of the worst kind among it."""
    folder = tmp_path_factory.mktemp("report")
    random = np.random.default_rng(0)
    images = [[random.random((24, 24 + 40 * j)).astype(np.float32) for j in range(9)]] * 2
    values = {"predictions": random.normal(size=500).tolist(), "labels": [1.0, 2.0, np.nan]}
    section = Section(
        "fidelity",
        {"frechet_distance": Measure(12345.678, 0.00012, 11000.0, 13000.5, 10_000, LONG),
         "coverage": missing(LONG)},
        [LONG], {"file": LONG, "nested": {LONG: [1, 2]}},
        [Plot(LONG, "histogram", values, LONG[:30], lines={LONG: 9.0}),
         Plot("Bars", "bars", {"one": [-1.0, 2e6], LONG: [3e-5, float("nan")]}, "", LONG[:30],
              ("first", LONG))],
        [Picture(LONG, images, (LONG, "second"), [[LONG] * 9, ["short"]])],
        [{"case": LONG, "psnr": 31.2, "note": None}] * 201,
    )  # fmt: skip
    write_report(folder, {"extractor": {"name": LONG}, "seed": 1}, [section, Section("empty")])
    return folder / PAGE


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_opens_offline_and_fits(browser: Browser, report: Path, width: int, scheme: str) -> None:
    browser.open(report, width, scheme)
    assert browser.requests() == []
    assert browser.messages() == []
    assert browser.value("document.scripts.length") == 0
    assert browser.value(BROKEN) == 0
    assert browser.value(BEYOND) <= 0, "the page is wider than the screen"
    assert browser.value(OVERLAPS) == 0
    assert browser.value(TEXT_OUTSIDE) == []
    back = browser.value("getComputedStyle(document.body).backgroundColor")
    assert (back == "rgb(255, 255, 255)") == (scheme == "light")


def test_it_is_printed_dark_on_white_and_uncut(browser: Browser, report: Path) -> None:
    browser.open(report, 720, "dark", medium="print")
    back = browser.value("getComputedStyle(document.body).backgroundColor")
    assert back == "rgb(255, 255, 255)"
    right = "Math.max(...[...document.images].map(e => e.getBoundingClientRect().right))"
    assert browser.value(right) <= 720
    assert browser.value(OVERLAPS) == 0


def test_pixels_are_enlarged_by_whole_factors(browser: Browser, report: Path) -> None:
    browser.open(report)
    sizes = browser.value(
        "[...document.querySelectorAll('img.whole')].map(e => [e.naturalWidth, e.clientWidth,"
        "e.naturalHeight, e.clientHeight, getComputedStyle(e).imageRendering])"
    )
    assert len(sizes) > 10
    for width, shown_width, height, shown_height, rendering in sizes:
        assert shown_width % width == 0
        assert shown_height == height * (shown_width // width)
        assert rendering == "pixelated"


def test_the_watch_sees_what_a_bad_page_does(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text(
        '<!DOCTYPE html><title>bad</title><img src="http://example.invalid/a.png" alt="">'
        "<script>console.log('hello'); nothing.there</script>"
    )
    browser.open(page)
    assert browser.requests() == ["http://example.invalid/a.png"]
    assert browser.seen("Runtime.consoleAPICalled")
    assert browser.seen("Runtime.exceptionThrown")


def test_what_got_past_the_escaping_would_be_stopped(
    browser: Browser, report: Path, tmp_path: Path
) -> None:
    page = tmp_path / "report.html"
    injected = '<img src="http://example.invalid/a.png"><script>document.title = "x"</script>'
    page.write_text(report.read_text().replace("<main>", f"<main>{injected}", 1))
    browser.open(page)
    assert browser.value("document.title") == "SynthCube evaluation"
    stopped = [event.get("blockedReason") for event in browser.seen("Network.loadingFailed")]
    assert stopped == ["csp"] * len(browser.requests())
    assert browser.messages()
