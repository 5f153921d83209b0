import dataclasses
import runpy
from pathlib import Path

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mrl_rag.models import MODELS, find_row, rows_for
from mrl_rag.tasks import TASKS

ROOT = Path(__file__).parents[1]
SCRIPT = runpy.run_path(str(ROOT / "docs" / "make_models.py"))
every_row = pytest.mark.parametrize("spec", MODELS.values(), ids=MODELS)


def test_the_committed_page_is_what_the_table_makes():
    assert (ROOT / "docs" / "models.md").read_text(encoding="utf-8") == SCRIPT["models_page"]()


def test_every_row_of_the_page_has_all_its_cells():
    lines = [line for line in SCRIPT["models_page"]().splitlines() if line.startswith("|")]
    bars = {line.count("|") - line.count(r"\|") for line in lines}
    assert len(lines) == len(MODELS) + 2
    assert bars == {len(SCRIPT["COLUMNS"]) + 1}


def test_the_script_writes_the_page_and_its_check_refuses_another(tmp_path, capsys):
    page = tmp_path / "models.md"
    with pytest.raises(SystemExit) as missing:
        SCRIPT["main"](["--check"], page=page)
    SCRIPT["main"]([], page=page)
    SCRIPT["main"](["--check"], page=page)
    page.write_text("# Models\n")
    with pytest.raises(SystemExit) as different:
        SCRIPT["main"](["--check"], page=page)
    assert missing.value.code == different.value.code == 1
    assert "make_models.py" in capsys.readouterr().err


def test_names_and_hub_ids_are_unique():
    assert list(MODELS) == [spec.name for spec in MODELS.values()]
    assert len({spec.hub_id for spec in MODELS.values()}) == len(MODELS)


@every_row
def test_the_dimensions_fall_from_the_full_one(spec):
    assert spec.dims[0] == spec.full_dim
    assert list(spec.dims) == sorted(set(spec.dims), reverse=True)
    assert spec.matryoshka == (len(spec.dims) > 1)


@every_row
def test_who_is_no_matryoshka_model_says_so(spec):
    assert spec.matryoshka != spec.note.startswith("Not trained with Matryoshka loss")


@every_row
def test_every_row_names_its_sources(spec):
    assert spec.sources
    assert all(url.startswith("https://") and " " not in url for url in spec.sources)
    assert len(set(spec.sources)) == len(spec.sources)


@every_row
def test_prompts_belong_to_tasks(spec):
    assert set(spec.prompts) <= set(TASKS)
    assert all(spec.prompts.values())


@every_row
def test_transformers_has_the_network_without_remote_code(spec):
    assert spec.architecture in CONFIG_MAPPING


@every_row
def test_a_row_cannot_be_changed(spec):
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.licence = "other"
    with pytest.raises(TypeError):
        spec.prompts["query"] = "other"
    assert hash(spec) == hash(dataclasses.replace(spec))
    assert spec == dataclasses.replace(spec)


def test_a_row_is_found_by_short_name_and_by_hub_id():
    row = MODELS["nomic-v1.5"]
    assert find_row("nomic-v1.5") is find_row("nomic-ai/nomic-embed-text-v1.5") is find_row(row.hub_id.upper()) is row
    assert find_row("nomic-ai") is None


def test_a_language_finds_its_own_models_and_the_multilingual_ones():
    names = {language: {row.name for row in rows_for(language)} for language in ("en", "zh", "ja", None)}
    assert names[None] == set(MODELS)
    assert {"acge_text_embedding", "stella-large-zh-v3-1792d"} == names["zh"] - names["ja"]
    assert {"bge-m3", "qwen3-0.6b"} <= names["ja"] < names["zh"]
    assert "minilm" in names["en"] - names["zh"]
