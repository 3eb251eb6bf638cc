"""Pictures inside the page: a PNG for each image, enlarged by the browser by a whole factor."""

from __future__ import annotations

import base64
import io
import math

import numpy as np
import numpy.typing as npt
import PIL.Image

from synthcube.evaluation.report.markup import Markup, joined, tag
from synthcube.evaluation.report.words import clean
from synthcube.evaluation.results import Picture

_SMALLEST, _LARGEST = 96, 256  # width of an image in the page, in CSS pixels
_FEW = 4  # images in a row


def figure(picture: Picture) -> Markup:
    """The rows of images, each with its title above and captions below the images.

    Rows of a few images stand side by side where there is room; on a narrow screen, longer ones are
    scrolled. Each image is in the page with all its pixels, 8 bits of [0, 1]; what is not a number
    is black.

    Raises:
        ValueError: an image is neither (H, W) nor (H, W, 3).
    """
    columns = max((len(row) for row in picture.rows), default=0)
    kind = "rows few" if columns <= _FEW else "rows"
    rows = [_row(picture, place) for place in range(len(picture.rows))]
    inside = tag("div", *rows, class_=kind) if columns else tag("p", "No images to show.")
    label = f"Images: {picture.title}"
    region = tag("div", inside, class_="scroll", tabindex=0, role="region", aria_label=label)
    return tag("figure", tag("figcaption", picture.title), region, class_="picture")


def _row(picture: Picture, place: int) -> Markup:
    row = picture.rows[place]
    title = picture.row_titles[place] if place < len(picture.row_titles) else ""
    captions = picture.captions[place] if place < len(picture.captions) else []
    parts = [tag("div", tag("span", title), class_="title")] if title else []
    for j, image in enumerate(row):
        caption = captions[j] if j < len(captions) else ""
        where = f"{title or f'Row {place + 1}'}, image {j + 1} of {len(row)}"
        parts.append(_cell(image, caption, f"{where}: {caption}" if caption else where))
    return tag("div", *parts, class_="grid", style=f"--columns:{max(len(row), 1)}")


def png_uri(image: npt.NDArray[np.float32]) -> str:
    """(H, W) or (H, W, 3) in [0, 1] as a data URI of its 8-bit PNG, pixel for pixel.

    Raises:
        ValueError: the shape is another one.
    """
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3) or not image.size:
        raise ValueError(f"a picture of shape {image.shape}; (H, W) or (H, W, 3) is needed")
    pixels = np.rint(255 * np.nan_to_num(image, nan=0.0).clip(0, 1)).astype(np.uint8)
    out = io.BytesIO()
    PIL.Image.fromarray(pixels).save(out, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode("ascii")


def _cell(image: npt.NDArray[np.float32], caption: str, alt: str) -> Markup:
    uri = png_uri(image)
    height, width = image.shape[:2]
    factor = max(1, math.ceil(_SMALLEST / width))
    scale = factor if factor * width <= _LARGEST else _LARGEST / width
    size = {"width": round(scale * width), "height": max(1, round(scale * height))}
    shown = tag("img", src=uri, alt=clean(alt), class_="" if scale < 1 else "whole", **size)
    parts = [shown, tag("span", caption, style=f"max-width:{size['width']}px")]
    return tag("div", joined(*parts if caption else parts[:1]))
