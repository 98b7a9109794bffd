"""A model without its weights: its tokens, whatever is drawn, and the layout of its batches."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest

from tests.helpers import tiny
from xtransfer.config import ModelConfig
from xtransfer.data.task import Example
from xtransfer.data.tokens.tokenizer import Tokens, tokenize
from xtransfer.errors import UserError
from xtransfer.train import inputs
from xtransfer.train.inputs import ModelInputs

SETTINGS = ModelConfig(max_length=12, batch_size=8, steps=499)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tiny.checkpoint(tmp_path_factory.mktemp("model") / "tiny")
    (directory / "model.safetensors").unlink()  # none of this reads weights
    return str(directory)


def make(checkpoint: str, shards: int = 2, **changes: object) -> ModelInputs:
    settings = dataclasses.replace(SETTINGS, checkpoint=checkpoint, **changes)
    return ModelInputs("student", settings, shards=shards, token_cache=None)


def split(name: str, *texts: str, pair: str | None = None) -> list[Example]:
    return [Example(f"task/{name}/en/{i}", text, pair, -1, "en") for i, text in enumerate(texts)]


TRAIN = split("train", "good film", "bad", "the film is very poor", "fine", "a")
OTHER = split("unlabelled", "the awful film", "great")


def ids(tokens: Tokens) -> list[list[int]]:
    return [tokens.item(i)[0].tolist() for i in range(len(tokens))]


@pytest.mark.parametrize(
    "drawn",
    [
        TRAIN,
        [TRAIN[3], TRAIN[0]],
        [TRAIN[4], TRAIN[1], *OTHER],
        [OTHER[1], TRAIN[2], OTHER[0], TRAIN[0]],
        [dataclasses.replace(TRAIN[2], label=1)],
    ],
)
def test_what_is_drawn_has_its_own_tokens_in_its_order(checkpoint: str, drawn: list[Example]) -> None:
    found = make(checkpoint)
    expected = tokenize(found.tokenizer, [example.text for example in drawn], None, 12)
    assert ids(found.tokens(drawn, [TRAIN, OTHER])) == ids(found.tokens(drawn)) == ids(expected)


@pytest.mark.parametrize(
    ("drawn", "splits"), [(TRAIN[:1], [TRAIN]), (OTHER, [OTHER]), ([*TRAIN[1:3], OTHER[0]], [TRAIN, OTHER])]
)
def test_only_whole_splits_are_tokenised_and_only_those_that_are_needed(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, drawn: list[Example], splits: list[list[Example]]
) -> None:
    asked: list[Sequence[str]] = []
    found = make(checkpoint)
    whole = type(found.cache).tokens
    monkeypatch.setattr(
        type(found.cache), "tokens", lambda self, texts, *a, **b: asked.append(texts) or whole(self, texts, *a, **b)
    )
    found.tokens(drawn, [TRAIN, OTHER])
    assert asked == [[example.text for example in each] for each in splits]


def test_pairs_are_pairs_whatever_is_drawn_with_them(checkpoint: str) -> None:
    pairs, single = split("train", "good", "bad", pair="film"), split("unlabelled", "great")
    tokens = make(checkpoint).tokens([pairs[1], *single], [pairs, single])
    assert tokens.lengths.tolist() == [5, 3] and tokens.item(0)[1].tolist() == [0, 0, 0, 1, 1]


def test_many_examples_show_their_progress(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(inputs, "_MANY_EXAMPLES", len(TRAIN))
    found = make(checkpoint)
    found.tokens(OTHER)
    assert "tokens for" not in capsys.readouterr().out
    found.tokens(TRAIN[:1], [TRAIN])
    assert "tokenizing for the student: 5/5" in capsys.readouterr().out


def test_short_trainings_compile_one_size_of_batches(checkpoint: str) -> None:
    short, long = make(checkpoint).training_plan, make(checkpoint, steps=500).training_plan
    assert short.fitted_sizes == 1 < long.fitted_sizes == make(checkpoint).evaluation_plan(8).fitted_sizes
    assert (short.batch_size, short.row_length, short.multiple_of, short.packed) == (8, 12, 2, True)


def test_the_layout_is_of_the_settings(checkpoint: str) -> None:
    found = make(checkpoint, shards=4, row_length=24, packed=False)
    for plan in (found.training_plan, found.evaluation_plan(16)):
        assert (plan.row_length, plan.slots, plan.multiple_of, plan.packed) == (24, 1, 4, False)
    assert (found.training_plan.batch_size, found.evaluation_plan(16).batch_size) == (8, 16)


def test_every_part_of_an_accumulated_gradient_has_as_many_rows(checkpoint: str) -> None:
    found = make(checkpoint, shards=4, accumulation=3)
    assert (found.training_plan.multiple_of, found.training_plan.batch_size) == (12, 8)
    assert found.evaluation_plan(16).multiple_of == 4  # there is no gradient


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": ""}, "config key student.checkpoint is empty"),
        ({"checkpoint": "/nowhere"}, "/nowhere"),
        ({"max_length": 33}, "student.max_length is 33, but .* has 32 positions"),
    ],
)
def test_faults(checkpoint: str, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(**{"checkpoint": checkpoint} | changes)


def test_a_length_of_all_positions(checkpoint: str) -> None:
    found = make(checkpoint, max_length=32)
    assert found.tokens(split("train", "the film " * 40)).lengths.tolist() == [32]
    assert np.array_equal(found.tokens(TRAIN).lengths, make(checkpoint).tokens(TRAIN).lengths)
