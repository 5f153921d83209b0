"""The four tasks, and how a prompt is chosen and put before a text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, TypeAlias, get_args

from mrl_rag.errors import InvalidInput, InvalidTexts

Task: TypeAlias = Literal["query", "document", "classification", "clustering"]
TASKS: tuple[Task, ...] = get_args(Task)

# What the prompt of a task is called in models' own files, most telling name first.
# Of documents "document" alone: SentenceTransformer.encode_document has "passage" and "corpus" on its list as well, but
# its own empty "document" always goes before them.
PROMPT_NAMES: dict[Task, tuple[str, ...]] = {
    "query": ("query",),
    "document": ("document",),
    "classification": ("classification", "Classification"),
    "clustering": ("clustering", "Clustering"),
}

# Through UTF-16, where a pair of surrogates is one character: PDF readers give formulas as such pairs.
SURROGATE_ADVICE = (
    "it holds surrogates: text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace') joins pairs of them and "
    "replaces lone ones."
)


def prompts_by_task(prompts: Mapping[str, str | None]) -> dict[Task, str]:
    """Pick each task's prompt out of the prompts in a model's own files.

    Args:
        prompts: name -> prompt, as `config_sentence_transformers.json` holds them.

    Returns:
        task -> prompt for all four tasks; an empty string where the model has none.
    """
    return {
        task: next((prompts[name] or "" for name in names if name in prompts), "")
        for task, names in PROMPT_NAMES.items()
    }


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
        first: the number that an error gives to the first of them.

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
            raise InvalidTexts(f"texts[{position}] is no valid Unicode ({text[:40]!r}); {SURROGATE_ADVICE}")
    return checked


def is_unicode(text: str) -> bool:
    """Say whether a string can be written as UTF-8: one with a lone surrogate, as some PDF readers make, can't."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def with_prompt(text: str, prompt: str) -> str:
    """Put `prompt` before `text`, unless the text carries it already."""
    return text if text.startswith(prompt) else prompt + text
