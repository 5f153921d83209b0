"""The progress bar of long work."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Advance(Protocol):
    """Moves a progress bar."""

    def __call__(self, done: float, note: str = "") -> object:
        """Add the number of items that are done, and show a note behind the bar; "" leaves the note as it is."""


@contextmanager
def progress_bar(total: int | None, description: str, unit: str, shown: bool) -> Iterator[Advance]:
    """Yield a function to call with the number of items that are done.

    Args:
        total: how many items there are; None where that isn't known.
        description: the words before the bar.
        unit: the name of one item.
        shown: show a bar if standard error is a terminal, or in a notebook: a widget, or text without ipywidgets.
    """
    if not shown:
        # tqdm without a bar starts a thread nonetheless, and takes a lock that a fork may leave locked in the child.
        yield lambda done, note="": None
        return
    from tqdm import TqdmWarning

    with warnings.catch_warnings():
        # In a notebook without ipywidgets tqdm advises to install them; its text bar is good enough.
        warnings.simplefilter("ignore", TqdmWarning)
        from tqdm.auto import tqdm

    with tqdm(total=total, desc=description, unit=unit, disable=False if _in_notebook() else None) as bar:

        def advance(done: float, note: str = "") -> None:
            if note:
                bar.set_postfix_str(note, refresh=False)
            bar.update(done)

        yield advance


def _in_notebook() -> bool:
    """Return whether this process is a Jupyter kernel, whose standard error is shown but is no terminal."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")
