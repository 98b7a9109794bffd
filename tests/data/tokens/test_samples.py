"""Samples of tokens are what `take` copies, from any number of sources."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from xtransfer.data.tokens import samples
from xtransfer.data.tokens.tokenizer import Tokens


def tokens_of(lengths: list[int], first: int) -> Tokens:
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    ids = np.arange(first, first + offsets[-1], dtype=np.int32)
    return Tokens(ids, (ids % 2).astype(np.uint8), offsets, np.array([length > 2 for length in lengths], bool))


@given(st.data())
def test_a_sample_has_the_examples_of_its_sources(data: st.DataObject) -> None:
    lengths = st.lists(st.integers(1, 4), min_size=1, max_size=6)
    sources = [tokens_of(data.draw(lengths), 100 * number) for number in range(data.draw(st.integers(1, 3)))]
    places = [(number, row) for number, source in enumerate(sources) for row in range(len(source))]
    drawn = data.draw(st.lists(st.sampled_from(places), max_size=9))
    sample = samples.sample(
        sources, np.array([number for number, _ in drawn], np.int64), np.array([row for _, row in drawn], np.int64)
    )
    again = np.array(
        data.draw(st.lists(st.integers(0, len(drawn) - 1), max_size=6) if drawn else st.just([])), np.int64
    )
    for tokens, chosen in ((sample, drawn), (samples.select(sample, again), [drawn[i] for i in again])):
        expected = [sources[number].item(row) for number, row in chosen]
        assert len(tokens) == len(expected)
        assert tokens.lengths.tolist() == [len(ids) for ids, _ in expected]
        assert tokens.truncated.tolist() == [len(ids) > 2 for ids, _ in expected]
        copied = tokens.take(np.arange(len(expected)))
        for i, (ids, types) in enumerate(expected):
            assert copied.item(i)[0].tolist() == ids.tolist()
            assert copied.item(i)[1].tolist() == types.tolist()
        assert sum(len(piece) for piece in samples.pieces(tokens)) == len(expected)


def test_a_whole_source_stays_as_it_is() -> None:
    source = tokens_of([2, 3, 1], 0)
    assert samples.sample([source], np.zeros(3, np.int64), np.arange(3)) is source
    assert samples.sample([source], np.zeros(2, np.int64), np.arange(2)) is not source


def test_a_sample_copies_nothing_until_it_is_taken() -> None:
    source = tokens_of([3] * 1000, 0)
    sample = samples.select(source, np.arange(999, -1, -1))
    assert isinstance(sample, samples.SampledTokens)
    assert sample.sources[0].input_ids is source.input_ids
