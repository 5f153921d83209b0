"""Warns where an English model is given text in other languages of the Latin script."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from mrl_rag.encoder.suitability import not_english, share_outside_latin
from mrl_rag.extras import require
from mrl_rag.models import find_row

# Chunks looked at, 2 ms each: per file, so that no long file decides; before the warning; and in all.
_PER_FILE, _ENOUGH, _MOST = 3, 60, 600
# Shorter texts are too often taken for another language.
_MIN_CHARACTERS = 60


class LanguageCheck:
    """Counts in which languages chunks are. Of other scripts the encoder itself warns.

    Args:
        model: the encoder's model. Of one that isn't in the table of models, the languages are not known.
    """

    def __init__(self, model: str | None) -> None:
        spec = None if model is None else find_row(model)
        self._spec = spec if spec is not None and spec.languages == "en" else None
        self._seen = self._foreign = 0

    def look_at(self, texts: Sequence[str]) -> None:
        """Look at the chunks of a file, and warn once there are enough."""
        if self._spec is None or self._seen >= _MOST:
            return
        classify = require("py3langid", "files").classify
        for text in [text for text in texts if len(text) >= _MIN_CHARACTERS][:_PER_FILE]:
            if share_outside_latin([text]) <= 0.5:
                self._seen += 1
                self._foreign += classify(text)[0] != "en"
        if self._seen >= _ENOUGH:
            self.warn()

    def warn(self) -> None:
        """Warn if most chunks so far are not in English; nothing is looked at after that."""
        if self._spec is not None and self._foreign > self._seen / 2:
            texts = f"{self._foreign} of {self._seen} passages looked at are in other languages"
            warnings.warn(not_english(self._spec, texts), stacklevel=2)
            self._spec = None
