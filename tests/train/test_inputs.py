"""Inputs of a model without its weights: the tokens of selected examples, and the layout of batches."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest

from tests.helpers import tiny
from xtransfer.config import ModelConfig
from xtransfer.data.task import Example
from xtransfer.data.tokens.cache import TokenCache
from xtransfer.data.tokens.tokenizer import Tokens, tokenize
from xtransfer.errors import UserError
from xtransfer.train import inputs
from xtransfer.train.inputs import ModelInputs

SETTINGS = ModelConfig(max_length=12, batch_size=8, steps=499)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tiny.checkpoint(tmp_path_factory.mktemp("model") / "tiny")
    (directory / "model.safetensors").unlink()  # these tests need no weights
    return str(directory)


def make_inputs(checkpoint: str, shards: int = 2, **changes: object) -> ModelInputs:
    settings = dataclasses.replace(SETTINGS, checkpoint=checkpoint, **changes)
    return ModelInputs("student", settings, shards=shards, token_cache=None)


def split(name: str, *texts: str, pair: str | None = None) -> list[Example]:
    return [Example(f"task/{name}/en/{i}", text, pair, -1, "en") for i, text in enumerate(texts)]


TRAIN = split("train", "good film", "bad", "the film is very poor", "fine", "a")
OTHER = split("unlabelled", "the awful film", "great")


def ids(tokens: Tokens) -> list[list[int]]:
    return [tokens.item(i)[0].tolist() for i in range(len(tokens))]


@pytest.mark.parametrize(
    "selected",
    [
        TRAIN,
        [TRAIN[3], TRAIN[0]],
        [TRAIN[4], TRAIN[1], *OTHER],
        [OTHER[1], TRAIN[2], OTHER[0], TRAIN[0]],
        [dataclasses.replace(TRAIN[2], label=1)],
    ],
)
def test_selected_examples_get_their_own_tokens_in_order(checkpoint: str, selected: list[Example]) -> None:
    model_inputs = make_inputs(checkpoint)
    expected = tokenize(model_inputs.tokenizer, [example.text for example in selected], None, 12)
    assert ids(model_inputs.tokens(selected, [TRAIN, OTHER])) == ids(model_inputs.tokens(selected)) == ids(expected)


@pytest.mark.parametrize(
    ("selected", "splits"), [(TRAIN[:1], [TRAIN]), (OTHER, [OTHER]), ([*TRAIN[1:3], OTHER[0]], [TRAIN, OTHER])]
)
def test_only_the_needed_splits_are_tokenised_and_each_one_whole(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, selected: list[Example], splits: list[list[Example]]
) -> None:
    tokenised: list[Sequence[str]] = []
    model_inputs = make_inputs(checkpoint)
    original = type(model_inputs.cache).tokens

    def recording(self: TokenCache, texts: Sequence[str], *args: object, **options: object) -> Tokens:
        tokenised.append(texts)
        return original(self, texts, *args, **options)

    monkeypatch.setattr(type(model_inputs.cache), "tokens", recording)
    model_inputs.tokens(selected, [TRAIN, OTHER])
    assert tokenised == [[example.text for example in examples] for examples in splits]


def test_pairs_stay_pairs_beside_single_texts(checkpoint: str) -> None:
    pairs, single = split("train", "good", "bad", pair="film"), split("unlabelled", "great")
    tokens = make_inputs(checkpoint).tokens([pairs[1], *single], [pairs, single])
    assert tokens.lengths.tolist() == [5, 3] and tokens.item(0)[1].tolist() == [0, 0, 0, 1, 1]


def test_many_examples_show_progress(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(inputs, "_MANY_EXAMPLES", len(TRAIN))
    model_inputs = make_inputs(checkpoint)
    model_inputs.tokens(OTHER)
    assert "tokens for" not in capsys.readouterr().out
    model_inputs.tokens(TRAIN[:1], [TRAIN])
    assert "tokenizing for the student: 5/5" in capsys.readouterr().out


def test_short_training_compiles_one_batch_size(checkpoint: str) -> None:
    short, long = make_inputs(checkpoint).training_plan(64), make_inputs(checkpoint, steps=500).training_plan(64)
    assert short.fitted_sizes == 1 < long.fitted_sizes == make_inputs(checkpoint).evaluation_plan(8).fitted_sizes
    assert (short.batch_size, short.row_length, short.multiple_of, short.packed) == (8, 12, 2, True)


def test_batch_layout_follows_the_settings(checkpoint: str) -> None:
    model_inputs = make_inputs(checkpoint, shards=4, row_length=24, packed=False)
    for plan in (model_inputs.training_plan(64), model_inputs.evaluation_plan(16)):
        assert (plan.row_length, plan.slots, plan.multiple_of, plan.packed) == (24, 1, 4, False)
    assert (model_inputs.training_plan(64).batch_size, model_inputs.evaluation_plan(16).batch_size) == (8, 16)


def test_rows_divide_into_equal_microbatches(checkpoint: str) -> None:
    model_inputs = make_inputs(checkpoint, shards=4, accumulation=3)
    assert (model_inputs.training_plan(64).multiple_of, model_inputs.training_plan(64).batch_size) == (12, 8)
    assert model_inputs.evaluation_plan(16).multiple_of == 4  # evaluation has no microbatches


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": ""}, "config key student.checkpoint is empty"),
        ({"checkpoint": "/nowhere"}, "/nowhere"),
        ({"max_length": 33}, "student.max_length is 33, but .* has 32 positions"),
    ],
)
def test_invalid_settings_are_refused(checkpoint: str, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_inputs(**{"checkpoint": checkpoint} | changes)


def test_max_length_may_use_all_positions(checkpoint: str) -> None:
    model_inputs = make_inputs(checkpoint, max_length=32)
    assert model_inputs.tokens(split("train", "the film " * 40)).lengths.tolist() == [32]
    assert np.array_equal(model_inputs.tokens(TRAIN).lengths, make_inputs(checkpoint).tokens(TRAIN).lengths)
