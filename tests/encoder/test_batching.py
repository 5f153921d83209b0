from hypothesis import given
from hypothesis import strategies as st

from mrl_rag.encoder.batching import length_groups, token_batches


@given(st.lists(st.integers(1, 300)), st.integers(1, 1000), st.booleans())
def test_every_text_is_in_one_batch_and_batches_keep_the_budget(lengths, budget, padded):
    batches = list(token_batches(lengths, budget, padded=padded))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        tokens = [lengths[i] for i in batch]
        assert len(batch) == 1 or (len(batch) * max(tokens) if padded else sum(tokens)) <= budget


@given(st.lists(st.integers(1, 5), min_size=1))
def test_groups_of_one_length_cover_the_tokens_in_their_order(lengths):
    ends = 0
    found = []
    for start, count, length in length_groups(lengths):
        assert start == ends
        ends += count * length
        found += [length] * count
    assert found == lengths
