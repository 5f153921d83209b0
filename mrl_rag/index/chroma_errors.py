"""Translation of Chroma's errors into this package's."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from contextlib import contextmanager

from mrl_rag.compat.chroma import is_panic, says_not_writable, says_too_large
from mrl_rag.errors import IndexNotWritable, InvalidInput, TwoStageIndexError

# Characters of an argument, and of Chroma's answer, that a message quotes.
_MAX_QUOTED = 300
# Writes the beginning of an argument of any size and depth.
_QUOTING = reprlib.Repr()
_QUOTING.maxstring = _QUOTING.maxother = _QUOTING.maxlong = _MAX_QUOTED


@contextmanager
def chroma_errors(missing: bool = False) -> Iterator[None]:
    """Translate errors that Chroma raises.

    Args:
        missing: whether to translate `NotFoundError` as well; a caller may first look for a collection that has taken
            the missing one's place.

    Raises:
        IndexNotWritable: the disk is full or the folder can't be written.
        TwoStageIndexError: anything else that Chroma refused or failed at.
    """
    from chromadb.errors import ChromaError, InternalError, NotFoundError

    try:
        yield
    except BaseException as error:
        if not isinstance(error, ChromaError) and not is_panic(error):
            raise
        if isinstance(error, NotFoundError) and not missing:
            raise
        said = str(error)
        if isinstance(error, ChromaError) and not isinstance(error, InternalError):
            raise TwoStageIndexError(f"Chroma refused this ({type(error).__name__}): {said}") from error
        if says_not_writable(said):
            raise IndexNotWritable(
                f"Chroma can't write: {said}. Check the folder's permissions and the free disk space, then write again."
            ) from error
        raise TwoStageIndexError(
            f"Chroma failed: {said}. If the disk was full, make room and write again; if files were damaged, call "
            "repair(), and if that fails, restore the folder from a backup."
        ) from error


@contextmanager
def chroma_input(**arguments: object) -> Iterator[None]:
    """Translate Chroma's refusal of arguments.

    Args:
        **arguments: their values by their names, for the message.

    Raises:
        InvalidInput: Chroma doesn't take them.
    """
    from chromadb.errors import ChromaError, InvalidArgumentError

    try:
        yield
    except (ValueError, TypeError, RecursionError, ChromaError) as error:
        # A server that can't parse a request raises `ChromaError` itself; its subclasses mean something else.
        if isinstance(error, ChromaError) and type(error) not in (ChromaError, InvalidArgumentError):
            raise
        raise InvalidInput(f"Chroma doesn't take {_quoted(arguments)}: {_short(str(error))}") from error


@contextmanager
def chroma_condition(where: object, where_document: object) -> Iterator[None]:
    """Translate Chroma's refusal of a condition; None stands for no condition.

    Raises:
        InvalidInput: Chroma doesn't take one of them.
    """
    from chromadb.errors import InternalError

    given = {"where": where, "where_document": where_document}
    given = {name: condition for name, condition in given.items() if condition}
    if not given:
        yield
        return
    try:
        with chroma_input(**given):
            yield
    except InternalError as error:
        if not says_too_large(str(error)):
            raise
        raise InvalidInput(
            f"Chroma doesn't take {_quoted(given)}: a string or a regular expression in it is too long; shorten it."
        ) from error


def _quoted(arguments: dict[str, object]) -> str:
    return _short(", ".join(f"{name}={_QUOTING.repr(value)}" for name, value in arguments.items()))


def _short(text: str) -> str:
    return text if len(text) <= _MAX_QUOTED else f"{text[:_MAX_QUOTED]}..."
