import sys

import pytest

from mrl_rag.errors import InvalidInput, MissingExtra
from mrl_rag.tokens import load_encoding, tokenize


def test_no_token_is_lost_where_a_long_text_is_split():
    encoding = load_encoding("o200k_base", "tokens")
    text = "a <|endoftext|> naïve 東京 " * 10_000
    assert encoding.decode(tokenize(encoding, text)) == text
    assert tokenize(encoding, "") == []


def test_a_model_is_known_by_its_encoding():
    assert load_encoding("gpt-4o", "tokens") is load_encoding("o200k_base", "openai")


def test_a_failure_is_said_again_and_forgotten_once_it_is_mended(monkeypatch):
    load_encoding.cache_clear()
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "tiktoken", None)
        for extra in ("openai", "tokens", "tokens"):
            with pytest.raises(MissingExtra, match=rf"mrl-rag\[{extra}\]: pip install .*'tiktoken>="):
                load_encoding("cl100k_base", extra)
    for _ in range(2):
        with pytest.raises(InvalidInput, match="nonsense"):
            load_encoding("nonsense", "tokens")
    assert load_encoding("cl100k_base", "tokens").name == "cl100k_base"
