"""Gives unused disk space back; see `TwoStageIndex.compact`.

Every step leaves the folder whole, wherever the process ends. The full vectors are copied into a new file, which the
collection names only once the copy is on the disk; then the old one is removed. Readers that have it open go on, and
open the new one when they see that the collection names another.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import uuid
from dataclasses import replace
from pathlib import Path

from mrl_rag.compat.chroma import COMMAND
from mrl_rag.errors import IndexNotWritable, TwoStageIndexError
from mrl_rag.index.archive import LmdbArchive
from mrl_rag.index.config import PREFIX
from mrl_rag.index.info import disk_bytes
from mrl_rag.index.storage import Storage, Stores

# Least share of an archive's pages that must be unused before it is copied.
_MIN_UNUSED_SHARE = 0.1
_MAX_SECONDS = 3600
# Files of a graph of Chroma's. A folder with anything else in it is not one of these.
_GRAPH_FILES = {"data_level0.bin", "header.bin", "index_metadata.pickle", "length.bin", "link_lists.bin"}
_GRAPH_FOLDER = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}(?:\.damaged-[0-9a-f]{8})?")
_ARCHIVE_FILE = re.compile(r"archive-([0-9a-f]{32})\.(?:lmdb|lmdb-lock|shortlist\.npz.*)")
# Prints which graphs and archives the collections of all tenants and databases use. It runs in a separate process:
# closing the file in this one would release Chroma's locks on it.
_USED = f"""
import json, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], uri=True, timeout=600)
sql = "SELECT id FROM segments", "SELECT str_value FROM collection_metadata WHERE key = '{PREFIX}archive'"
print(json.dumps([[row[0] for row in connection.execute(statement)] for statement in sql]))
"""


def compact_folder(folder: Path) -> None:
    """Remove what no collection uses, and rewrite Chroma's file without what was deleted."""
    remove_unused(folder)
    _run([sys.executable, "-c", COMMAND, "vacuum", "--path", str(folder), "--force", "--timeout", str(_MAX_SECONDS)])


def folder_bytes(folder: Path) -> int:
    """Return the size of the files that mrl-rag and Chroma made in a folder."""
    ours = [path for path in folder.iterdir() if _is_graph(path) or _ARCHIVE_FILE.fullmatch(path.name)]
    return sum(map(disk_bytes, [folder / "chroma.sqlite3", *ours]))


def remove_unused(folder: Path) -> None:
    """Remove graphs and archives that no collection uses."""
    # Listed first: what is made after this line is left alone.
    there = list(folder.iterdir())
    file = f"{(folder / 'chroma.sqlite3').as_uri()}?mode=ro"
    segments, archives = json.loads(_run([sys.executable, "-I", "-S", "-c", _USED, file]))
    for path in there:
        named = _ARCHIVE_FILE.fullmatch(path.name)
        if named and path.is_file() and named[1] not in archives:
            path.unlink(missing_ok=True)
        elif _is_graph(path) and path.name not in segments:
            for part in path.iterdir():
                part.unlink()
            path.rmdir()


def _is_graph(path: Path) -> bool:
    if not _GRAPH_FOLDER.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
        return False
    files = list(path.iterdir())
    return bool(files) and all(file.name in _GRAPH_FILES and file.is_file() for file in files)


def compact_archive(storage: Storage, stores: Stores, folder: Path) -> None:
    """Copy the archive without its unused pages, under a new name, and remove the old one.

    Args:
        storage: holds the lock for writing.
        stores: of the index, which must be opened again afterwards.
        folder: where they are.
    """
    old, shortlist = stores.archive, stores.shortlist
    if not isinstance(old, LmdbArchive) or old.unused_share < _MIN_UNUSED_SHARE:
        return
    config = replace(stores.config, archive=uuid.uuid4().hex)
    old.copy_to(folder / f"archive-{config.archive}.lmdb")
    new = storage.open_archive(config, create=False)
    assert isinstance(new, LmdbArchive)
    new.forget_changes()
    before = stores.config
    shortlist.remember(config)
    storage.remove_archive(before, old)
    # Chroma's graph in this process is up to date, with the new archive as with the old one.
    storage.stores(shortlist, new).note_written()


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=_MAX_SECONDS + 60
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise TwoStageIndexError(f"the folder can't be compacted: {error}. Nothing is lost; try again.") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip()[-300:]
        raise IndexNotWritable(
            f"the folder can't be compacted: {said}. Nothing is lost. Check its permissions and the free disk space; "
            "SQLite needs as much as chroma.sqlite3 takes."
        )
    return done.stdout
