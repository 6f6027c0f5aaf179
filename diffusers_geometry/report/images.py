"""Images inside the page itself, small enough that the page can be sent: thumbnails as data URIs within a budget of bytes."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

SIDE, SMALL, BUDGET = 128, 64, 600_000


@dataclass(frozen=True)
class Thumbnail:
    """One image as the page holds it.

    Attributes:
        uri: A ``data:`` address; None if there is no image.
        width: Of the original, pixels.
        height: Of the original, pixels.
        problem: Why there is no image although there should be one.
    """

    uri: str | None
    width: int = 0
    height: int = 0
    problem: str | None = None

    @property
    def pixelated(self) -> bool:
        """Whether it is so small that it is to be enlarged without smoothing."""
        return max(self.width, self.height) <= SMALL


def thumbnails(picture: Callable[[int], Any], rows: Sequence[Sequence[int]], budget: int = BUDGET) -> dict[int, Thumbnail]:
    """Thumbnails of rows of units, whole rows in the order given, until the budget is spent; the first row always.

    Args:
        picture: Gives the PIL image of a unit or None; raises ValueError with the reason if it cannot be read.
        rows: Units that are shown together, the most important row first.
        budget: Bytes of all addresses together.
    """
    shown: dict[int, Thumbnail] = {}
    spent = 0
    for row in rows:
        made = {unit: thumbnail(picture, unit) for unit in row}
        cost = sum(len(t.uri or "") for t in made.values())
        if shown and spent + cost > budget:
            break
        spent += cost
        shown |= made
    return shown


def thumbnail(picture: Callable[[int], Any], unit: int) -> Thumbnail:
    """The image of a unit, at most 128 pixels wide and high; one of at most 64 keeps all its pixels (PNG), others are JPEG."""
    try:
        image = picture(unit)
    except ValueError as error:
        return Thumbnail(None, problem=str(error))
    if image is None:
        return Thumbnail(None)
    width, height = image.size
    buffer = io.BytesIO()
    if max(width, height) <= SMALL:
        image.convert("L" if image.mode in ("1", "L") else "RGB").save(buffer, format="PNG", optimize=True)
        kind = "png"
    else:
        small = image.convert("RGB")
        small.thumbnail((SIDE, SIDE))
        small.save(buffer, format="JPEG", quality=82, optimize=True)
        kind = "jpeg"
    uri = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Thumbnail(uri, width, height)
