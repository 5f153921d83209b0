"""The four tasks, and the prompt that each puts before a text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, TypeAlias, get_args

from mrl_rag.errors import InvalidInput, InvalidTexts

Task: TypeAlias = Literal["query", "document", "classification", "clustering"]
TASKS: tuple[Task, ...] = get_args(Task)

# Names of each task's prompt in models' own files, in the order in which they are looked up. For documents only
# "document": SentenceTransformer.encode_document lists "passage" and "corpus" as well, but always finds its own empty
# "document" first.
PROMPT_NAMES: dict[Task, tuple[str, ...]] = {
    "query": ("query",),
    "document": ("document",),
    "classification": ("classification", "Classification"),
    "clustering": ("clustering", "Clustering"),
}

# In UTF-16 a pair of surrogates is one character; PDF readers give formulas as such pairs.
SURROGATE_ADVICE = (
    "it holds surrogates: text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace') joins pairs of them and "
    "replaces lone ones."
)


def prompts_by_task(prompts: Mapping[str, str | None]) -> dict[Task, str]:
    """Return each task's prompt from the prompts in a model's own files.

    Args:
        prompts: name -> prompt, as in `config_sentence_transformers.json`.

    Returns:
        task -> prompt for all four tasks; an empty string where the model has none.
    """
    return {
        task: next((prompts[name] or "" for name in names if name in prompts), "")
        for task, names in PROMPT_NAMES.items()
    }


def merge_prompts(own: Mapping[Task, str], override: Mapping[Task, str] | None) -> dict[Task, str]:
    """Return a model's own prompts, overridden by a caller's.

    Raises:
        InvalidInput: a key is not a task, or a prompt is not a string.
    """
    merged = dict(own)
    for task, prompt in (override or {}).items():
        if not isinstance(prompt, str):
            raise InvalidInput(f"prompts[{task!r}] is {prompt!r}; a prompt is a string, '' for none.")
        merged[check_task(task)] = prompt
    return merged


def check_task(task: object) -> Task:
    """Return `task` when it is one of the four.

    Raises:
        InvalidInput: it is not.
    """
    for known in TASKS:
        if task == known:
            return known
    raise InvalidInput(f"task is {task!r}; it must be one of {', '.join(map(repr, TASKS))}.")


def check_texts(texts: Iterable[str], first: int = 0) -> list[str]:
    """Return the texts as a list.

    Args:
        texts: any iterable of strings.
        first: the position of the first text, for error messages.

    Raises:
        InvalidTexts: `texts` is a bare string, or one of them is not a string, or holds a lone surrogate.
    """
    if isinstance(texts, str):
        raise InvalidTexts(f"texts is a single string ({texts[:40]!r}); pass a list of strings.")
    try:
        checked = list(texts)
    except TypeError as error:
        raise InvalidTexts(f"texts is {texts!r}; pass a list of strings.") from error
    for position, text in enumerate(checked, first):
        if not isinstance(text, str):
            raise InvalidTexts(f"texts[{position}] is {text!r}, not a string; leave it out or pass ''.")
        if not is_unicode(text):
            raise InvalidTexts(f"texts[{position}] is not valid Unicode ({text[:40]!r}); {SURROGATE_ADVICE}")
    return checked


def is_unicode(text: str) -> bool:
    """Say whether a string can be encoded as UTF-8; lone surrogates, which some PDF readers produce, can't."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def with_prompt(text: str, prompt: str) -> str:
    """Put `prompt` before `text`, unless the text starts with it."""
    return text if text.startswith(prompt) else prompt + text
