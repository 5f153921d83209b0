"""The house of the design: imports only go down, and adapters use public names alone."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    "errors": -1,  # the ground itself: extras raises one of them
    "extras": 0,
    "compat": 0,
    "arguments": 0,
    "progress": 0,
    "lifetime": 0,
    "intervals": 0,
    "truncation": 1,
    "tasks": 1,
    "tokens": 1,
    "budget": 2,
    "quantization": 2,
    "rotation": 2,
    "models": 2,
    "heads": 3,
    "encoder": 4,
    "index": 4,
    "binding": 5,
    "retriever": 6,
    "evaluation": 7,
    "classification": 5,
    "testing": 5,
    "files": 7,
    "scale": 7,
    "doctor": 7,
    "report": 8,
    "cli": 9,
    "__main__": 10,
}
MODULES = sorted(
    path for path in (ROOT / "mrl_rag").rglob("*.py") if path.parent != ROOT / "mrl_rag" or path.stem != "__init__"
)
# What the adapters may import from, beside the public names of `mrl_rag` itself.
PUBLIC = (
    "mrl_rag",
    "mrl_rag.arguments",
    "mrl_rag.binding",
    "mrl_rag.compat.chroma",
    "mrl_rag.errors",
    "mrl_rag.extras",
    "mrl_rag.progress",
)
ADAPTERS = sorted((ROOT / "integrations").rglob("*.py"))


def imports(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield node.module, [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)


def room(file):
    return file.relative_to(ROOT / "mrl_rag").with_suffix("").parts[0]


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_room_imports_only_from_itself_and_from_below(file):
    for module, _ in imports(file):
        if module and module.startswith("mrl_rag."):
            other = module.split(".")[1]
            assert other == room(file) or FLOORS[other] < FLOORS[room(file)], f"{room(file)} imports {module}"


@pytest.mark.parametrize("file", ADAPTERS, ids=lambda file: str(file.relative_to(ROOT)))
def test_adapters_import_only_public_names(file):
    import mrl_rag

    for module, names in imports(file):
        if module and module.split(".")[0] == "mrl_rag":
            assert module in PUBLIC, module
            if module == "mrl_rag":
                assert set(names) <= set(mrl_rag.__all__)
