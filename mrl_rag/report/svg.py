"""Figures as SVG that takes its colours and font from the page around it."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from typing import NamedTuple
from xml.etree import ElementTree

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mrl_rag.report.palette import COLOURS

_VARIABLES = {colour.light: f"var(--{colour.name})" for colour in COLOURS}
_COLOUR = re.compile("|".join(_VARIABLES))
_FONT = re.compile(r" ?font-family: [^;]*;?")
_REFERENCE = re.compile(r"(?<=^#)(.+)$|(?<=^url\(#)([^)]+)")
# Of the markers in a legend, filled and hollow.
_GLYPHS = {"o": "●○", "s": "■□", "^": "▲△", "D": "◆◇", "v": "▼▽"}


class LegendEntry(NamedTuple):
    """One line of a legend: a sign, its colour as CSS, and what it stands for."""

    sign: str
    colour: str
    label: str


def to_svg(figure: Figure, name: str, alt: str, tips: Sequence[str] = ()) -> tuple[Markup, list[LegendEntry]]:
    """Draw a figure for a page.

    Colours of the palette become CSS variables, text stays text, and ids begin with `name`, so that several figures
    fit on one page.

    Args:
        figure: drawn in colours of `palette`. Its legend is taken out of it.
        name: of the figure, unique on the page: letters and hyphens.
        alt: what somebody should know who can't see it.
        tips: a text for each of the points with the gid "records", shown when it is pointed at.

    Returns:
        The SVG element, and the legend for the page to show.
    """
    legend = _take_legend(figure)
    file = io.BytesIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), warnings.catch_warnings():
        # Of letters that matplotlib's own font lacks; the browser's fonts have them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(file.getvalue())
    _simplify(root, name)
    _add_tips(root, f"{name}-records", tips)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": alt}
    # ElementTree has escaped all texts.
    return Markup(ElementTree.tostring(root, encoding="unicode")), legend


def _take_legend(figure: Figure) -> list[LegendEntry]:
    entries = []
    for legend in figure.legends:
        for handle, text in zip(legend.legend_handles, legend.get_texts(), strict=True):
            if isinstance(handle, Line2D):
                hollow = handle.get_markerfacecolor() == "none"
                signs = _GLYPHS.get(str(handle.get_marker()), "┄┄")
                entries.append(
                    LegendEntry(signs[hollow], _themed(mpl.colors.to_hex(handle.get_color())), text.get_text())
                )
    figure.legends.clear()
    return entries


def _themed(style: str) -> str:
    return _COLOUR.sub(lambda found: _VARIABLES[found.group()], style)


def _simplify(root: ElementTree.Element, name: str) -> None:
    """Leave what the page needs, as HTML writes it. A style sheet would hold for the whole page."""
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {key.rpartition("}")[2]: " ".join(value.split()) for key, value in element.attrib.items()}
        if element.tag != "text":
            element.text = None
        element.tail = None
        if "style" in element.attrib:
            element.attrib["style"] = _themed(_FONT.sub("", element.attrib["style"]))
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag in ("metadata", "style")]:
            parent.remove(child)
    _rename_ids(root, name)


def _rename_ids(root: ElementTree.Element, name: str) -> None:
    """Begin the ids that are used with the figure's name, and remove the others."""
    used = {"records"}
    for element in root.iter():
        for key in ("href", "clip-path"):
            if key in element.attrib:
                used.update(found.group() for found in _REFERENCE.finditer(element.attrib[key]))
                element.attrib[key] = _REFERENCE.sub(lambda found: f"{name}-{found.group()}", element.attrib[key])
    for element in root.iter():
        id_ = element.attrib.pop("id", None)
        if id_ in used:
            element.attrib["id"] = f"{name}-{id_}"


def _add_tips(root: ElementTree.Element, id_: str, tips: Sequence[str]) -> None:
    if tips:
        group = next(element for element in root.iter() if element.get("id") == id_)
        points = [element for element in group.iter() if element.tag == "use"]
        for point, tip in zip(points, tips, strict=True):
            ElementTree.SubElement(point, "title").text = tip
