import subprocess
import sys

import pytest
import tiktoken

from mrl_rag import fit_to_context
from mrl_rag.budget import counter
from mrl_rag.errors import InvalidInput, InvalidTexts


def words(text):
    return len(text.split())


def test_the_best_that_fit_are_kept_in_their_order_and_the_rest_is_named():
    packed = fit_to_context(["one two three", "a b c d e f g h", "four five"], 6, encoding=words, separator="")
    assert (packed.kept, packed.left_out, packed.tokens) == ((0, 2), (1,), 5)


def test_room_is_kept_for_the_answer_and_for_separators():
    assert fit_to_context(["a b", "c d"], 6, reserve=2, encoding=words).kept == (0, 1)
    assert fit_to_context(["a b", "c d"], 6, reserve=3, encoding=words).kept == (0,)
    assert fit_to_context(["a b", "c d"], 4, encoding=words, separator="- ").kept == (0,)


def test_the_first_is_kept_even_alone_and_too_long():
    packed = fit_to_context(["a b c d", "e"], 2, encoding=words)
    assert (packed.kept, packed.left_out, packed.tokens) == ((0,), (1,), 4)
    assert fit_to_context([], 2, encoding=words).kept == ()


def test_tokens_are_counted_as_tiktoken_does_with_special_tokens_as_plain_text():
    text = "A <|endoftext|> in a document, naïve 東京."
    count = counter("o200k_base")
    assert count(text) == len(tiktoken.get_encoding("o200k_base").encode(text, disallowed_special=()))
    assert count("<|endoftext|>") > 1
    assert counter("gpt-4o")(text) == count(text)
    assert counter("cl100k_base")(" " * 250_000) > 0


def test_it_works_without_a_network(tmp_path):
    code = """
import socket
def refuse(*arguments, **settings):
    raise OSError("no network")
socket.socket.connect = refuse
from mrl_rag import fit_to_context
print(fit_to_context(["a", "b"], 100).kept)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "(0, 1)\n"


@pytest.mark.parametrize(
    "arguments",
    [{"max_tokens": 0}, {"max_tokens": True}, {"max_tokens": 10, "reserve": 10}, {"max_tokens": 10, "reserve": -1}],
)
def test_numbers_that_leave_no_room_are_refused(arguments):
    with pytest.raises(InvalidInput, match=r"max_tokens|reserve"):
        fit_to_context(["a"], encoding=words, **arguments)


def test_an_encoding_nobody_knows_is_refused():
    with pytest.raises(InvalidInput, match="nonsense"):
        fit_to_context(["a"], 10, encoding="nonsense")
    with pytest.raises(InvalidTexts):
        fit_to_context("a text", 10)
