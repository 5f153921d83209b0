"""Warns where an English model is given text in other languages."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from mrl_rag.extras import require
from mrl_rag.models import MODELS, find_row

# Chunks looked at, 2 ms each: per file, so that no long file decides; before the warning; and in all.
_PER_FILE, _ENOUGH, _MOST = 3, 60, 600
# Shorter texts are too often taken for another language.
_MIN_CHARACTERS = 60


class LanguageCheck:
    """Counts in which languages chunks are.

    Args:
        model: the encoder's model. Of one that isn't in the table of models, the languages are not known.
    """

    def __init__(self, model: str | None) -> None:
        row = None if model is None else find_row(model)
        self._model = row.name if row is not None and row.languages == "en" else ""
        self._seen = self._foreign = 0

    def look_at(self, texts: Sequence[str]) -> None:
        """Look at the chunks of a file, and warn once there are enough."""
        if not self._model or self._seen >= _MOST:
            return
        classify = require("py3langid", "files").classify
        for text in [text for text in texts if len(text) >= _MIN_CHARACTERS][:_PER_FILE]:
            self._seen += 1
            self._foreign += classify(text)[0] != "en"
        if self._seen >= _ENOUGH:
            self.finish()

    def finish(self) -> None:
        """Warn if most chunks so far are not in English; nothing is looked at after that."""
        if self._model and self._foreign > self._seen / 2:
            names = ", ".join(repr(row.name) for row in MODELS.values() if row.languages == "multilingual")
            warnings.warn(
                f"{self._model} was trained on English, and {self._foreign} of {self._seen} passages looked at are in "
                f"other languages: it will find little in them. Use a multilingual model: {names}.",
                stacklevel=2,
            )
            self._model = ""
