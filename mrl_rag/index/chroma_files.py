"""Chroma's own files in a folder: what can be told of them without letting Chroma read them."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from pathlib import Path
from uuid import UUID

import numpy as np
import numpy.typing as npt

# The header of Chroma's fork of hnswlib: version, offset of level 0, room for, elements, bytes an element, offsets of
# label and vector, top level, entry point, links a level, links at level 0, links wanted, factor of levels, ef.
_HEADER = struct.Struct("<i6QiI3QdQ")
_VERSION = 1
_MOST_LINKS = 65536
# Elements looked at together: what more would take stays with the process.
_BLOCK = 4096
_FILES = {"header.bin", "data_level0.bin", "length.bin", "link_lists.bin", "index_metadata.pickle"}
_ASIDE = ".damaged"
# In a process of its own: SQLite's locks are lost when a process closes a file that it has open a second time.
_ASK = """
import sqlite3, sys, time
end = time.monotonic() + float(sys.argv[3])
connection = sqlite3.connect(sys.argv[1], uri=True, timeout=60)
connection.set_progress_handler(lambda: time.monotonic() > end, 10_000)
try:
    for row in connection.execute(sys.argv[2]):
        print(row[0])
except sqlite3.OperationalError:
    sys.exit(2)
except sqlite3.DatabaseError as error:
    print(error)
"""


def graph_fault(graph: Path) -> str:
    """Say what is wrong with a graph that Chroma would read, "" where nothing is or its format isn't known.

    Chroma trusts these files: a link that leads nowhere ends the process.

    Args:
        graph: the folder of one segment.
    """
    sizes = {name: _size(graph / f"{name}.bin") for name in ("header", "data_level0", "length", "link_lists")}
    lost = [name for name, size in sizes.items() if size is None]
    if lost:
        return f"{lost[0]}.bin is missing"
    header = (graph / "header.bin").read_bytes()
    if len(header) != _HEADER.size:
        return "header.bin has another length"
    facts = _HEADER.unpack(header)
    version, start, room, count, width, label, vector, top, entry, links, links0, wanted, factor, ef = facts
    if version != _VERSION:
        return ""
    if (
        start != 0
        or not count <= room
        or not 1 < links == wanted < _MOST_LINKS
        or not abs(factor * np.log(links) - 1) < 1e-6
        or not 0 < ef < 2**31
        or links0 != 2 * links
        or vector != 4 + 4 * links0
        or not vector < label == width - 8
        or (count and (not 0 <= top < 64 or entry >= count))
    ):
        return "header.bin contradicts itself"
    if (sizes["data_level0"] or 0) < count * width or (sizes["length"] or 0) < count * 4:
        return "data_level0.bin or length.bin is too short"
    if not count:
        return ""
    everywhere = np.zeros(count, dtype=np.int64)
    for at in range(0, count, _BLOCK):
        # Read, not mapped: a file that gets shorter under a map ends the process, too.
        part = np.fromfile(graph / "data_level0.bin", np.uint8, min(_BLOCK, count - at) * width, offset=at * width)
        words = np.ascontiguousarray(part.reshape(-1, width)[:, :vector]).view("<u4")
        if not _lead_somewhere(words, everywhere[: len(words)], everywhere):
            return "data_level0.bin has links that lead nowhere"
    return _upper_fault(np.fromfile(graph / "link_lists.bin", np.uint8), count, links, top, entry)


def sqlite_fault(folder: Path, seconds: float) -> str:
    """Say what SQLite finds wrong with Chroma's file, "" where nothing is or it would take longer.

    Args:
        folder: Chroma's.
        seconds: how long it may take; meanwhile Chroma can't write.
    """
    found = _ask(folder, "PRAGMA integrity_check(3)", seconds) or []
    return "" if found == ["ok"] else "; ".join(found)


def live_graphs(folder: Path) -> set[str] | None:
    """Return the names of the folders that collections have their graphs in, None where that can't be told."""
    found = _ask(folder, "SELECT id FROM segments", 60)
    return None if found is None or not all(map(_is_uuid, found)) else set(found)


def graph_of(folder: Path, collection: str) -> Path | None:
    """Return the folder of a collection's graph, None where that can't be told.

    Args:
        folder: Chroma's.
        collection: the collection's id.
    """
    found = _ask(folder, f"SELECT id FROM segments WHERE {_graph_segment(collection)}", 60)
    return folder / found[0] if found and _is_uuid(found[0]) else None


def was_saved(folder: Path, collection: str) -> bool:
    """Say whether Chroma has saved the collection's graph at some time, and so can't make it anew from its log."""
    saved = f"SELECT seq_id FROM max_seq_id JOIN segments ON id = segment_id WHERE {_graph_segment(collection)}"
    return bool(_ask(folder, saved, 60))


def graphs(folder: Path) -> list[Path]:
    """Return the folders that hold a graph, one set aside included."""
    found = {path.parent for path in folder.glob("*/*") if path.name in _FILES}
    return sorted(path for path in found if _is_uuid(path.name.removesuffix(_ASIDE)))


def set_aside(graph: Path) -> None:
    """Rename a graph, so that Chroma doesn't find it; `remove_dead` removes it when nothing needs it any more."""
    if graph.is_dir():
        aside = graph.with_name(f"{graph.name}{_ASIDE}")
        shutil.rmtree(aside, ignore_errors=True)
        graph.rename(aside)


def remove_dead(folder: Path) -> None:
    """Remove the graphs of collections that are deleted: Chroma leaves them."""
    # In this order: a graph that is new meanwhile isn't looked at.
    found = graphs(folder)
    live = live_graphs(folder) if found else None
    for graph in found:
        ours = {path.name for path in graph.iterdir()} <= _FILES
        if live is not None and ours and graph.name.removesuffix(_ASIDE) not in live:
            shutil.rmtree(graph, ignore_errors=True)


def _lead_somewhere(words: npt.NDArray[np.uint32], level: npt.NDArray[np.int64], levels: npt.NDArray[np.int64]) -> bool:
    """Say whether lists of links are no longer than they may be, to elements that have links at that level.

    Args:
        words: uint32 [n, 1 + most]: the number of links, in its lower half, and the links.
        level: int64 [n], of each list.
        levels: int64 [elements], up to which each has links.
    """
    counts = words[:, 0] & 0xFFFF
    used = np.arange(words.shape[1] - 1) < counts[:, None]
    if counts.max(initial=0) >= words.shape[1]:
        return False
    rows, _ = np.nonzero(used)
    to = words[:, 1:][used]
    return not len(to) or bool(to.max() < len(levels) and (levels[to] >= level[rows]).all())


def _upper_fault(stored: npt.NDArray[np.uint8], count: int, links: int, top: int, entry: int) -> str:
    """Check link_lists.bin: an element's bytes, then its lists from level 1 up."""
    fault = "link_lists.bin has links that lead nowhere"
    if len(stored) % 4:
        return fault
    words, width = stored.view("<u4"), 1 + links
    levels = np.zeros(count, dtype=np.int64)
    starts: list[int] = []
    level: list[int] = []
    at = element = 0
    for position in np.flatnonzero(words).tolist():
        if position < at:
            continue
        # Elements without lists are a zero each.
        element += position - at
        height, rest = divmod(int(words[position]), 4 * width)
        if rest or element >= count or position + 1 + height * width > len(words):
            return fault
        levels[element] = height
        starts += range(position + 1, position + 1 + height * width, width)
        level += range(1, height + 1)
        at, element = position + 1 + height * width, element + 1
    if element + len(words) - at != count or levels.max() != top or levels[entry] != top:
        return fault
    lists = words[np.asarray(starts, dtype=np.int64)[:, None] + np.arange(width)] if starts else np.empty((0, width))
    return "" if _lead_somewhere(lists.astype(np.uint32), np.asarray(level, dtype=np.int64), levels) else fault


def _graph_segment(collection: str) -> str:
    return f"scope = 'VECTOR' AND collection = '{UUID(collection)}'"


def _ask(folder: Path, question: str, seconds: float) -> list[str] | None:
    """Return the first column of SQLite's answer about Chroma's file, None where there is none."""
    if not sys.executable:
        return None
    file = f"{(folder / 'chroma.sqlite3').absolute().as_uri()}?mode=ro"
    try:
        answer = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _ASK, file, question, str(seconds)],
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=seconds + 90,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.splitlines()


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _is_uuid(text: str) -> bool:
    try:
        return str(UUID(text)) == text
    except ValueError:
        return False
