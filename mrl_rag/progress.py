"""The progress bar of long work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(total: int | None, description: str, unit: str, shown: bool) -> Iterator[Callable[[float], object]]:
    """Yield a function to call with the number of items that are done.

    Args:
        total: how many items there are; None where that isn't known.
        description: what stands before the bar.
        unit: what one item is called.
        shown: show a bar, where standard error is a terminal.
    """
    if not shown:
        # tqdm without a bar starts a thread nonetheless, and takes a lock that a fork may leave locked in the child.
        yield lambda done: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=description, unit=unit, disable=None) as bar:
        yield bar.update
