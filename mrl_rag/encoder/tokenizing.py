"""Tokenizers, those of the tokenizers library and those in Python, behind the methods that the encoder calls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

if TYPE_CHECKING:
    import tokenizers


class PythonEncoding(NamedTuple):
    """What `PythonTokenizer` makes of a text; fields as in `tokenizers.Encoding`."""

    ids: list[int]
    type_ids: list[int]
    overflowing: list[PythonEncoding]


class PythonTokenizer:
    """A tokenizer that transformers has in Python alone, as ByT5's, with the methods of `tokenizers.Tokenizer`.

    It can't say where in a text a token stands.

    Args:
        tokenizer: of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._max_length: int | None = None

    def enable_truncation(self, max_length: int, direction: str) -> None:
        """Cut what has more tokens than `max_length`, special tokens counted; `direction` is the tokenizer's own."""
        self._max_length = max_length

    def num_special_tokens_to_add(self, is_pair: bool) -> int:
        """Return how many special tokens an encoding has."""
        found: int = self._tokenizer.num_special_tokens_to_add(is_pair)
        return found

    def encode(self, text: str) -> PythonEncoding:
        """Return the tokens of a text."""
        whole = self._call(text)
        over = 0 if self._max_length is None else len(whole.ids) - self._max_length
        if over <= 0:
            return whole
        cut = self._call(text, truncation=True, max_length=self._max_length)
        # Rust's have special tokens as well.
        rest = [0] * (over + self.num_special_tokens_to_add(False))
        return cut._replace(overflowing=[PythonEncoding(rest, rest, [])])

    def encode_batch(self, texts: Sequence[str]) -> list[PythonEncoding]:
        """Return the tokens of each text."""
        return [self.encode(text) for text in texts]

    def _call(self, text: str, **settings: Any) -> PythonEncoding:
        found = self._tokenizer(text, return_token_type_ids=True, verbose=False, **settings)
        return PythonEncoding(found["input_ids"], found["token_type_ids"], [])


def prepare(tokenizer: Any, *, lower_case: bool) -> tokenizers.Tokenizer | PythonTokenizer:
    """Return what tokenizes, set never to pad.

    Args:
        tokenizer: of transformers.
        lower_case: whether texts are put in lower case before its own normalisation.
    """
    if not tokenizer.is_fast:
        if lower_case:
            tokenizer.do_lower_case = True
        return PythonTokenizer(tokenizer)
    found: tokenizers.Tokenizer = tokenizer.backend_tokenizer
    found.no_padding()
    if lower_case:
        found.normalizer = _lower_cased(found.normalizer)
    return found


def _lower_cased(normalizer: Any) -> Any:
    from tokenizers import normalizers

    parts: list[Any] = [] if normalizer is None else [normalizer]
    if isinstance(normalizer, normalizers.Sequence):
        parts = list(cast(Iterable[Any], normalizer))
    has = any(isinstance(part, normalizers.Lowercase) for part in parts)
    return normalizer if has else normalizers.Sequence([normalizers.Lowercase(), *parts])
