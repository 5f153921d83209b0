"""Finds the files in folders."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from mrl_rag.errors import InvalidInput
from mrl_rag.tasks import is_unicode

# Larger files are data more often than text, and a file is read as a whole.
MAX_BYTES = 100 * 2**20
_LEFT_OUT = frozenset({"__pycache__", "node_modules"})


@dataclass(frozen=True)
class Problem:
    """A file that was left out.

    Attributes:
        path: the file or folder.
        reason: why, in a few words.
    """

    path: str
    reason: str


@dataclass
class Finder:
    """Finds the files to read.

    Args:
        paths: files and folders, absolute.
        glob: patterns of the files to take from folders, of which one must match; empty for every file.
        exclude: patterns of files and folders to leave out.
        unreadable: called with what can't be read.
        ignored: called with what isn't a file, such as a socket.
    """

    paths: Sequence[Path]
    glob: Sequence[str]
    exclude: Sequence[str]
    unreadable: Callable[[Problem], object]
    ignored: Callable[[Problem], object]
    _folders: set[tuple[int, int]] = field(default_factory=set, init=False)
    _files: set[tuple[int, int]] = field(default_factory=set, init=False)

    def find(self) -> Iterator[Path]:
        """Yield the files, those of a folder in alphabetical order, each once however many links lead to it."""
        for root in self.paths:
            waiting = [root]
            while waiting:
                path = waiting.pop()
                try:
                    if not is_unicode(str(path)):
                        self.unreadable(Problem(str(path), "its name is not valid Unicode; rename it"))
                        continue
                    found = path.stat()
                    if stat.S_ISDIR(found.st_mode):
                        waiting += reversed(self._inside(path, root, found))
                    elif self._takes(path, root, found):
                        yield path
                except OSError as error:
                    self.unreadable(Problem(str(path), reason_of(path, error)))

    def excludes(self, path: Path) -> bool:
        """Say whether a file in one of the folders is left out by its name, or by that of a folder above it."""
        for root in self.paths:
            if path.is_relative_to(root) and path != root:
                parts = path.relative_to(root).parts
                return any(self._leaves_out(root.joinpath(*parts[: end + 1]), root) for end in range(len(parts)))
        return False

    def _inside(self, path: Path, root: Path, found: os.stat_result) -> list[Path]:
        """Return what is to be looked at in a folder, in alphabetical order."""
        identity = found.st_dev, found.st_ino
        if identity in self._folders:
            self.ignored(Problem(str(path), "it leads to a folder that is read already"))
            return []
        if path != root and (path / "chroma.sqlite3").exists():
            return []
        self._folders.add(identity)
        return [path / name for name in sorted(os.listdir(path)) if not self._leaves_out(path / name, root)]

    def _takes(self, path: Path, root: Path, found: os.stat_result) -> bool:
        if not stat.S_ISREG(found.st_mode):
            self.ignored(Problem(str(path), "it is not a file"))
            return False
        if path != root and self.glob and not _matches(path, root, self.glob):
            return False
        if found.st_size > MAX_BYTES:
            size = f"{found.st_size / 2**20:,.0f} MB"
            self.unreadable(Problem(str(path), f"it has {size}, more than {MAX_BYTES >> 20} MB; split it"))
            return False
        identity = found.st_dev, found.st_ino
        known = identity in self._files
        self._files.add(identity)
        return not known

    def _leaves_out(self, path: Path, root: Path) -> bool:
        hidden = path.name.startswith(".") or path.name in _LEFT_OUT
        return hidden or _matches(path, root, self.exclude)


def absolute(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Return paths as absolute ones, links kept.

    Raises:
        InvalidInput: `paths` is a single path, or empty.
    """
    if isinstance(paths, str | os.PathLike):
        raise InvalidInput(f"paths is {os.fspath(paths)!r}; pass a list of files and folders.")
    found = [Path(os.path.abspath(Path(path).expanduser())) for path in paths]
    if not found:
        raise InvalidInput("paths is empty; pass the files and folders to read.")
    return found


def _matches(path: Path, root: Path, patterns: Sequence[str]) -> bool:
    """Say whether a file's name, or its path below the folder, matches a pattern."""
    below = path.relative_to(root).as_posix()
    return any(fnmatch(path.name, pattern) or fnmatch(below, pattern.rstrip("/")) for pattern in patterns)


def reason_of(path: Path, error: OSError) -> str:
    """Return why a file or folder can't be read, in a few words."""
    if isinstance(error, FileNotFoundError):
        return "it is a link to nothing" if path.is_symlink() else "there is no such file or folder"
    return (error.strerror or str(error)).lower()
