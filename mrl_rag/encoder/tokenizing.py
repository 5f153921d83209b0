"""Texts to token sequences."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import numpy as np

from mrl_rag.encoder.batching import TokenSequence
from mrl_rag.encoder.recipe import Recipe
from mrl_rag.errors import InvalidInput, InvalidTexts
from mrl_rag.lifetime import NATIVE_CODE
from mrl_rag.tasks import Task, with_prompt

LongInputs: TypeAlias = Literal["truncate", "average", "error"]

# Characters of a text that are read for each token of `max_length`, unless all of it is asked for: many times what
# texts have, so that a text of any length takes little time.
_READ_PER_TOKEN = 100
# Characters that are tokenized at a time: a tokenizer takes 170 to 450 bytes for each.
_AT_A_TIME = 250_000


class Tokenized(NamedTuple):
    """Texts as token sequences.

    Attributes:
        sequences: one per text; several for a long text that was split; none for a text without tokens.
        text_index: the position of each sequence's text.
        overruns: for each text that was truncated, how many tokens were left out; an estimate where the text has more
            than 100 characters per token of `max_length`, as no more are read.
    """

    sequences: list[TokenSequence]
    text_index: list[int]
    overruns: list[int]


class Tokenizer:
    """Puts prompts before texts, and turns them into token sequences of at most `max_length` tokens.

    Args:
        model: the model's name, for messages.
        tokenizer: of transformers.
        recipe: says whether texts are lower-cased, and prompts pooled.
        prompts: task -> text put before the input.
        long_inputs: what is done with a text longer than `max_length`; as for `MatryoshkaEncoder`.

    Attributes:
        pad_id: the token that pads.
        sample: two sequences of different lengths.
        max_length: longest sequence, special tokens counted; None before `truncate_at`.

    Raises:
        InvalidInput: the tokenizer can't split long texts, as `long_inputs` asks.
    """

    def __init__(
        self, model: str, tokenizer: Any, recipe: Recipe, prompts: Mapping[Task, str], long_inputs: LongInputs
    ) -> None:
        self.max_length: int | None = None
        self.pad_id: int = tokenizer.pad_token_id or 0
        self._model = model
        self._prompts = prompts
        self._long_inputs = long_inputs
        self._side: str = tokenizer.truncation_side
        # Configured once: changing its truncation in every call is what makes tokenizers unsafe to share by threads.
        self._backend: Any = _prepare(tokenizer, lower_case=recipe.lower_case)
        if long_inputs == "average":
            self.offsets("")
        self._specials: int = self._backend.num_special_tokens_to_add(False)
        self._prompt_lengths = {
            task: 0 if recipe.include_prompt or not prompt else self._prompt_length(prompt, tokenizer.all_special_ids)
            for task, prompt in prompts.items()
        }
        # The pad token may occur in a text as well.
        samples = self._backend.encode_batch(["a text", f"another one,{tokenizer.pad_token or ''} and longer"])
        # Type ids come from a tokenizer's template, so these show whether any is ever other than 0.
        self._has_types = "token_type_ids" in tokenizer.model_input_names and any(any(s.type_ids) for s in samples)
        self.sample = [self._sequence(encoding) for encoding in samples]

    def truncate_at(self, max_length: int) -> None:
        """Set the longest sequence, special tokens counted."""
        self.max_length = max_length
        self._backend.enable_truncation(max_length=max_length, direction=self._side)

    def tokenize(self, texts: Sequence[str], task: Task, first: int = 0) -> Tokenized:
        """Return the token sequences of texts.

        Args:
            texts: n strings.
            task: picks the prompt.
            first: the position of `texts[0]` in the caller's list, for a message.

        Raises:
            InvalidTexts: one is too long, and `long_inputs` is "error".
            InvalidInput: a prompt leaves no room for a piece of a long text.
        """
        prompt = self._prompts[task]
        found = Tokenized([], [], [])
        read = (with_prompt(self._read(text), prompt) for text in texts)
        for position, encoding in enumerate(self._encodings(read)):
            pieces = [encoding]
            if over := self._overrun(encoding, len(texts[position])):
                if self._long_inputs == "error":
                    raise InvalidTexts(
                        f"texts[{first + position}] is {over} tokens longer than max_length={self.max_length}; "
                        'split it, or make the encoder with long_inputs="truncate" or "average".'
                    )
                if self._long_inputs == "average":
                    pieces = self._split(texts[position], prompt)
                else:
                    found.overruns.append(over)
            sequences = [self._sequence(piece, self._prompt_lengths[task]) for piece in pieces if piece.ids]
            found.sequences.extend(sequences)
            found.text_index.extend([position] * len(sequences))
        return found

    def count(self, texts: Sequence[str], task: Task) -> list[int]:
        """Return the length of each text's token sequence before truncation, prompt and special tokens counted."""
        prompt = self._prompts[task]
        parts = [[part for _, part in _parts(with_prompt(text, prompt))] for text in texts]
        counts = (
            len(encoding.ids) - self._specials + sum(len(part.ids) - self._specials for part in encoding.overflowing)
            for encoding in self._encodings(part for each in parts for part in each)
        )
        return [self._specials + sum(islice(counts, len(each))) for each in parts]

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Return where each token of a text starts and ends, special tokens left out, nothing truncated.

        Raises:
            InvalidInput: the tokenizer is one in Python, which doesn't know.
        """
        if isinstance(self._backend, PythonTokenizer):
            raise InvalidInput(
                f"the tokenizer of {self._model} doesn't say where in a text its tokens are. Split texts by their "
                'characters, and leave out long_inputs="average".'
            )
        found: list[tuple[int, int]] = []
        for at, part in _parts(text):
            with NATIVE_CODE:
                encoding = self._backend.encode(part, add_special_tokens=False)
            pairs = (pair for each in (encoding, *encoding.overflowing) for pair in each.offsets)
            found.extend((at + start, at + end) for start, end in pairs)
        return found

    def _read(self, text: str) -> str:
        """Return as much of a text as is tokenized to make a vector of it."""
        if self._long_inputs == "average" or self.max_length is None:
            return text[:_AT_A_TIME]
        most = _READ_PER_TOKEN * self.max_length
        return text[-most:] if self._side == "left" else text[:most]

    def _encodings(self, texts: Iterable[str]) -> Iterator[Any]:
        """Yield the encodings of texts, of which few are in memory at a time."""
        batch: list[str] = []
        length = 0
        for text in chain(texts, [None]):
            if batch and (text is None or length + len(text) > _AT_A_TIME):
                with NATIVE_CODE:
                    encodings = self._backend.encode_batch(batch)
                yield from encodings
                batch, length = [], 0
            if text is not None:
                batch.append(text)
                length += len(text)

    def _overrun(self, encoding: Any, characters: int) -> int:
        """Return how many tokens of a text with so many characters are left out of an encoding; maybe an estimate."""
        over = sum(len(part.ids) - self._specials for part in encoding.overflowing)
        read = _READ_PER_TOKEN * (self.max_length or characters)
        if characters <= read:
            return over
        kept = len(encoding.ids) - self._specials
        return max(1, (over + kept) * characters // read - kept)

    def _sequence(self, encoding: Any, prompt_length: int = 0) -> TokenSequence:
        # As arrays, so that the forward pass joins them quickly while the device waits.
        ids = np.array(encoding.ids, dtype=np.int32)
        types = np.array(encoding.type_ids, dtype=np.int32) if self._has_types else None
        return TokenSequence(ids, min(prompt_length, len(ids)), types)

    def _prompt_length(self, prompt: str, special_ids: list[int]) -> int:
        """Return how many of a sequence's first tokens are the prompt's, as sentence-transformers counts them."""
        ids = self._backend.encode(prompt).ids
        return len(ids) - any(last in special_ids for last in ids[-1:])

    def _split(self, text: str, prompt: str) -> list[Any]:
        """Return the encodings of pieces of a text of about equal length, each with the prompt, none truncated."""
        return [piece for _, part in _parts(text.removeprefix(prompt)) for piece in self._split_part(part, prompt)]

    def _split_part(self, text: str, prompt: str) -> list[Any]:
        assert self.max_length is not None
        offsets = self.offsets(text)
        room = self.max_length - self._specials - len(self.offsets(prompt))
        if room < 1:
            raise InvalidInput(
                f"the prompt {prompt[:40]!r} fills max_length={self.max_length}; nothing of a text fits beside it. "
                "Raise max_length, or shorten the prompt."
            )
        count = -(-len(offsets) // room)
        while True:
            ends = [offsets[len(offsets) * piece // count - 1][1] for piece in range(1, count)] + [len(text)]
            starts = [0, *ends[:-1]]
            pieces = [prompt + text[start:end] for start, end in zip(starts, ends, strict=True)]
            with NATIVE_CODE:
                encodings = self._backend.encode_batch(pieces)
            # A piece by itself may have more tokens than it had in the text.
            if not any(encoding.overflowing for encoding in encodings):
                return list(encodings)
            count += 1


def _parts(text: str) -> Iterator[tuple[int, str]]:
    """Yield a text in parts to tokenize one by one, with their positions, cut before white space if there is any."""
    start = 0
    while len(text) - start > _AT_A_TIME:
        end = max(text.rfind(space, start + 1, start + _AT_A_TIME) for space in " \n")
        end = end if end > 0 else start + _AT_A_TIME
        yield start, text[start:end]
        start = end
    yield start, text[start:]


class PythonEncoding(NamedTuple):
    """The tokens of a text; fields as in `tokenizers.Encoding`."""

    ids: list[int]
    type_ids: list[int]
    overflowing: list[PythonEncoding]


class PythonTokenizer:
    """A tokenizer that transformers has only in Python, such as ByT5's, with the methods of `tokenizers.Tokenizer`.

    It can't say where in a text a token is.

    Args:
        tokenizer: of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._max_length: int | None = None

    def enable_truncation(self, max_length: int, direction: str) -> None:
        """Truncate to `max_length` tokens, special tokens counted; `direction` is the tokenizer's own."""
        self._max_length = max_length

    def num_special_tokens_to_add(self, is_pair: bool) -> int:
        """Return the number of special tokens in an encoding."""
        found: int = self._tokenizer.num_special_tokens_to_add(is_pair)
        return found

    def encode(self, text: str) -> PythonEncoding:
        """Return the tokens of a text."""
        whole = self._call(text)
        over = 0 if self._max_length is None else len(whole.ids) - self._max_length
        if over <= 0:
            return whole
        cut = self._call(text, truncation=True, max_length=self._max_length)
        # As in `tokenizers.Encoding`, with special tokens.
        rest = [0] * (over + self.num_special_tokens_to_add(False))
        return cut._replace(overflowing=[PythonEncoding(rest, rest, [])])

    def encode_batch(self, texts: Sequence[str]) -> list[PythonEncoding]:
        """Return the tokens of each text."""
        return [self.encode(text) for text in texts]

    def _call(self, text: str, **settings: Any) -> PythonEncoding:
        found = self._tokenizer(text, return_token_type_ids=True, verbose=False, **settings)
        return PythonEncoding(found["input_ids"], found["token_type_ids"], [])


def _prepare(tokenizer: Any, *, lower_case: bool) -> Any:
    """Return the `tokenizers.Tokenizer` or `PythonTokenizer` that does the work, without padding.

    Args:
        tokenizer: of transformers.
        lower_case: whether texts are lower-cased before its own normalisation.
    """
    if not tokenizer.is_fast:
        if lower_case:
            tokenizer.do_lower_case = True
        return PythonTokenizer(tokenizer)
    found: Any = tokenizer.backend_tokenizer
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
