"""Cut a scan to its printed area, so that resizing does not spend most of a model's pixels on blank paper."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageFilter

from im2json.options import Trim

# H rows, W columns.
COARSE = 600  # pixels of the longer side where the printed area is looked for
DARKER = 40  # than the paper around, of 255: what counts as ink there
NEEDED = 0.006  # share of a row or column that must be ink
BORDER = 0.02  # kept around the printed area, as a share of its size
EDGE = 4  # coarse pixels at the border of a scan that never count: shadows, cut edges

LEAST = 18  # darkness that can be print in the full picture
SHARE = 0.3  # of the darkness of the darkest 1.5 %: what is darker is print
RULE = 0.4  # of a column's rows: what has more ink is a line or an edge, not print
PRINTED = 0.004  # share of a row that must be print
AROUND = 0.0016  # of the height, that is kept above and below a row of print
EVERY = 4  # of the blank rows, one in so many is kept


def trimmed(picture: Image.Image, how: Trim) -> Image.Image:
    """Return a picture cut to its printed area, or the picture itself if it is `off` or nothing is printed.

    Args:
        how: off; crop: cut; squeeze: cut, and leave out three of four rows without print.
    """
    if how == "off":
        return picture
    box = printed_box(picture)
    if box is None:
        return picture
    cut = picture.crop(box)
    if how == "crop":
        return cut
    blank = ~printed_rows(cut)
    kept = ~blank | (np.cumsum(blank) % EVERY == 0)
    return cut if blank.all() else Image.fromarray(np.asarray(cut)[kept])


def printed_box(picture: Image.Image) -> tuple[int, int, int, int] | None:
    """Return left, top, right and bottom of the area that holds ink, with a border, or None if there is none."""
    width, height = picture.size
    scale = COARSE / max(width, height)
    size = max(8, round(width * scale)), max(8, round(height * scale))
    small = picture.convert("L").resize(size, Image.Resampling.BOX)
    ink = _darkness(small, small) > DARKER  # H x W
    ink[:EDGE] = ink[-EDGE:] = False
    ink[:, :EDGE] = ink[:, -EDGE:] = False
    rows = _span(ink.mean(1))
    columns = None if rows is None else _span(ink[slice(*rows)].mean(0))
    if rows is None or columns is None:
        return None
    (top, bottom), (left, right) = rows, columns
    across, down = BORDER * (right - left) + 3, BORDER * (bottom - top) + 3
    return (
        max(0, int((left - across) / scale)),
        max(0, int((top - down) / scale)),
        min(width, int((right + across) / scale) + 1),
        min(height, int((bottom + down) / scale) + 1),
    )


def printed_rows(picture: Image.Image) -> NDArray[np.bool_]:
    """Return which rows of a scan hold print or lie close to some; H."""
    gray = picture.convert("L")
    width, height = gray.size
    quarter = gray.resize((max(8, width // 4), max(8, height // 4)), Image.Resampling.BOX)
    darkness = _darkness(gray, quarter)  # H x W
    inked = darkness > max(LEAST, SHARE * float(np.percentile(darkness[::3, ::3], 98.5)))
    inked[:, inked.mean(0) > RULE] = False
    rows = inked[:, int(0.01 * width) : max(1, int(0.99 * width))].mean(1) > PRINTED
    reach = min(max(1, round(AROUND * height)), (height - 1) // 2)
    return np.convolve(rows, np.ones(2 * reach + 1), "same") > 0.5


def _darkness(picture: Image.Image, small: Image.Image) -> NDArray[np.uint8]:
    """Return how much darker each pixel is than the paper around it, which is found in a smaller copy; H x W."""
    paper = small.filter(ImageFilter.MaxFilter(9)).filter(ImageFilter.GaussianBlur(4))
    return np.asarray(ImageChops.subtract(paper.resize(picture.size, Image.Resampling.BILINEAR), picture))


def _span(share: NDArray[np.floating]) -> tuple[int, int] | None:
    """Return the first row or column with enough ink, smoothed over 7, and the one behind the last; None without."""
    found = np.flatnonzero(np.convolve(share, np.ones(7) / 7, "same") > NEEDED)
    return (int(found[0]), int(found[-1]) + 1) if len(found) else None
