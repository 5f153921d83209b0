"""The progress bar of long work."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(total: int | None, description: str, unit: str, shown: bool) -> Iterator[Callable[[float], object]]:
    """Yield a function to call with the number of items that are done.

    Args:
        total: how many items there are; None where that isn't known.
        description: the words before the bar.
        unit: the name of one item.
        shown: show a bar if standard error is a terminal, or in a notebook: a widget, or text without ipywidgets.
    """
    if not shown:
        # tqdm without a bar starts a thread nonetheless, and takes a lock that a fork may leave locked in the child.
        yield lambda done: None
        return
    from tqdm import TqdmWarning

    with warnings.catch_warnings():
        # In a notebook without ipywidgets tqdm advises to install them; its text bar is good enough.
        warnings.simplefilter("ignore", TqdmWarning)
        from tqdm.auto import tqdm

    with tqdm(total=total, desc=description, unit=unit, disable=False if _in_notebook() else None) as bar:
        yield bar.update


def _in_notebook() -> bool:
    """Return whether this process is a Jupyter kernel, whose standard error is shown but is no terminal."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")
