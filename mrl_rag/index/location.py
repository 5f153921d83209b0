"""Files by path or URL, on this machine and in object stores, through pyarrow's file systems and those of fsspec."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from mrl_rag.errors import InvalidInput, MissingExtra
from mrl_rag.extras import require
from mrl_rag.index.archive import sync

# Schemes that pyarrow serves itself; any other is fsspec's.
_OF_PYARROW = ("file", "s3", "gs", "gcs", "abfs", "abfss", "hdfs")
# In these a file appears when its upload is complete.
_OBJECT_STORES = ("s3", "gcs", "abfs")


class Location:
    """A file or folder, by its path or URL.

        Location("./shards"), Location("s3://bucket/shards"), Location("memory://shards")

    Args:
        place: a path; or a URL of a scheme that pyarrow or an installed fsspec package serves, with pyarrow's options
            in its query, such as "s3://bucket/shards?endpoint_override=host:9000&scheme=http".

    Attributes:
        name: what was given, for messages.
        local: the absolute path; None for a URL.
        url: the absolute path, or the URL, for other processes.

    Raises:
        InvalidInput: the URL can't be understood.
        MissingExtra: pyarrow, or the package that serves the scheme, is not installed.
    """

    def __init__(self, place: str | os.PathLike[str]) -> None:
        self.name = os.fspath(place)
        self.local: Path | None = None
        arrow = require("pyarrow.fs", "parquet")
        scheme = self.name.partition("://")[0] if "://" in self.name else ""
        try:
            if not scheme:
                self.local = Path(self.name).expanduser().absolute()
                self._fs, self._path = arrow.LocalFileSystem(), self.local.as_posix()
            elif scheme in _OF_PYARROW:
                self._fs, self._path = arrow.FileSystem.from_uri(self.name)
            else:
                found, self._path = require("fsspec", "parquet").core.url_to_fs(self.name)
                self._fs = arrow.PyFileSystem(arrow.FSSpecHandler(found))
            self.url = self.name if self.local is None else str(self.local)
        except (ValueError, OSError) as error:
            raise InvalidInput(f"{self.name} is no path or URL that can be opened: {error}.") from error
        except MissingExtra:
            raise
        except ImportError as error:
            raise MissingExtra(f"{self.name} needs a package that is not installed: {error}") from error

    def __repr__(self) -> str:
        return f"Location({self.name!r})"

    @contextmanager
    def errors(self, what: str = "") -> Iterator[None]:
        """Translate the file system's errors.

        Args:
            what: a file in this folder, for the message.

        Raises:
            InvalidInput: a file can't be read or written.
        """
        try:
            yield
        except OSError as error:
            place = f"{self.name}/{what}" if what else self.name
            raise InvalidInput(
                f"{place} can't be read or written: {error}. Check the name, the access and the room there."
            ) from error

    def kind(self) -> str:
        """Return "file", "folder", or "" where there is nothing."""
        with self.errors():
            found = self._fs.get_file_info(self._path)
        return {"File": "file", "Directory": "folder"}.get(found.type.name, "")

    def size(self, name: str) -> int | None:
        """Return the bytes of a file of this folder; None where there is none."""
        with self.errors(name):
            found = self._fs.get_file_info(self._at(name))
        return int(found.size or 0) if found.is_file else None

    def files(self, recursive: bool = False) -> dict[str, int]:
        """Return the bytes of each file in this folder, by its path below it, in alphabetical order."""
        selector = require("pyarrow.fs", "parquet").FileSelector(self._path, allow_not_found=True, recursive=recursive)
        with self.errors():
            found = [info for info in self._fs.get_file_info(selector) if info.is_file]
        root = PurePosixPath("/", self._path)
        return {str(PurePosixPath("/", i.path).relative_to(root)): i.size or 0 for i in sorted(found, key=_path_of)}

    def open(self, name: str = "") -> Any:
        """Open a file of this folder, or this file, to read at any position; a `pyarrow.NativeFile`."""
        with self.errors(name):
            return self._fs.open_input_file(self._at(name))

    def write(self, name: str, data: Any) -> None:
        """Write a file of this folder. A reader finds all of it, or what was there before.

        Args:
            name: of the file.
            data: its bytes, or a pyarrow buffer.

        Raises:
            InvalidInput: it can't be written.
        """
        path = self._at(name)
        with self.errors(name):
            if self._fs.type_name in _OBJECT_STORES:
                self._put(path, data)
                return
            self._fs.create_dir(self._path, recursive=True)
            temporary = self._at(f".{name}.{uuid.uuid4().hex[:8]}")
            try:
                self._put(temporary, data)
                self._fs.move(temporary, path)
            except BaseException:
                with suppress(OSError):
                    self._fs.delete_file(temporary)
                raise
            if self.local is not None:
                sync(self.local)

    def delete(self, name: str) -> None:
        """Remove a file of this folder; one that is gone already is ignored."""
        with self.errors(name), suppress(FileNotFoundError):
            self._fs.delete_file(self._at(name))

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}" if name else self._path

    def _put(self, path: str, data: Any) -> None:
        with self._fs.open_output_stream(path) as stream:
            stream.write(data)
        if self.local is not None:
            sync(Path(path))


def _path_of(info: Any) -> str:
    return str(info.path)
