"""The colours of figures and page, each for a light and a dark background."""

from __future__ import annotations

from typing import NamedTuple


class Colour(NamedTuple):
    """One colour.

    Attributes:
        name: of its CSS variable, without the dashes.
        light: for white paper; what a figure is drawn with.
        dark: for a dark screen.
    """

    name: str
    light: str
    dark: str


INK = Colour("ink", "#1f2328", "#e6edf3")
MUTED = Colour("muted", "#59636e", "#9198a1")
LINE = Colour("line", "#d1d9e0", "#3d444d")
# Each has a contrast of at least 4 to 1 on its background; the first ones differ in lightness or hue to every eye.
SERIES = (
    Colour("c1", "#0969da", "#58a6ff"),
    Colour("c2", "#bc4c00", "#f0883e"),
    Colour("c3", "#1a7f37", "#3fb950"),
    Colour("c4", "#8250df", "#bc8cff"),
    Colour("c5", "#cf222e", "#ff7b72"),
    Colour("c6", "#0e7490", "#39c5cf"),
    Colour("c7", "#7d6608", "#d4a72c"),
    Colour("c8", "#bf3989", "#f778ba"),
)
COLOURS = (INK, MUTED, LINE, *SERIES)
