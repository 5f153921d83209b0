"""Write docs/models.md from the model table, or compare the two with --check."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mrl_rag.models import MODELS, ModelSpec

PAGE = Path(__file__).with_name("models.md")

TITLE = """\
# Models

A model of this table is opened by its short name, `MatryoshkaEncoder("nomic-v1.5")`; any other by its hub id or folder.
What a model's own files say of pooling, prompts and length wins over the table, which `python docs/make_models.py`
makes from `mrl_rag/models.py`.
"""

COLUMNS = (
    "name",
    "hub id",
    "architecture",
    "pooling",
    "layer norm before the cut",
    "query prompt",
    "document prompt",
    "full dimension",
    "trained dimensions",
    "longest input in tokens",
    "languages",
    "licence",
    "sources",
    "note",
)


def models_page() -> str:
    """Return the whole page, as Markdown."""
    rows = [COLUMNS, ("---",) * len(COLUMNS), *map(_cells, MODELS.values())]
    return TITLE + "\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _cells(spec: ModelSpec) -> tuple[str, ...]:
    return (
        _code(spec.name),
        f"[{spec.hub_id}](https://huggingface.co/{spec.hub_id})",
        _code(spec.architecture),
        spec.pooling or "its own files",
        "yes" if spec.layer_norm else "no",
        _code(spec.prompts.get("query", "")),
        _code(spec.prompts.get("document", "")),
        str(spec.full_dim),
        ", ".join(map(str, spec.dims)) if spec.matryoshka else "not Matryoshka",
        str(spec.max_length),
        spec.languages,
        spec.licence,
        " ".join(f"[{number}]({url})" for number, url in enumerate(spec.sources, start=1)),
        spec.note,
    )


def _code(text: str) -> str:
    # A bar ends a cell even inside code, and a line break ends the row.
    escaped = text.replace("|", r"\|").replace("\n", r"\n")
    return f"`{escaped}`" if text else "none"


def main(arguments: Sequence[str] | None = None, page: Path = PAGE) -> None:
    """Write the page, or leave with status 1 if it isn't what the table makes.

    Args:
        arguments: of the command line; None for those given.
        page: the file.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only; status 1 if they differ")
    if not parser.parse_args(arguments).check:
        page.write_text(models_page(), encoding="utf-8")
    elif not page.is_file() or page.read_text(encoding="utf-8") != models_page():
        parser.exit(1, f"{page} is not what the model table makes; run: python docs/make_models.py\n")


if __name__ == "__main__":
    main()
