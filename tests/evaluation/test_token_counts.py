"""The tokens of each evaluated language."""

import dataclasses

import pytest

from tests.helpers import tiny
from xtransfer.config import ModelConfig
from xtransfer.data.task import Example
from xtransfer.evaluation import token_counts
from xtransfer.runs.workdir import Workdir
from xtransfer.train.inputs import ModelInputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Return a tokenizer of which every known word is one piece, and which reads six tokens."""
    directory = tiny.checkpoint(tmp_path_factory.mktemp("tokens") / "encoder")
    settings = dataclasses.replace(ModelConfig(), checkpoint=str(directory), max_length=6)
    return ModelInputs("student", settings, shards=1, token_cache=None)


def record(workdir, inputs, texts, language="en"):
    examples = [Example(f"t/test/{language}/{i}", text, None, 0, language) for i, text in enumerate(texts)]
    token_counts.record(workdir, "test", inputs, examples, inputs.tokens(examples))


def test_counts_by_hand(tmp_path, inputs):
    workdir = Workdir(tmp_path)
    # Five words are one token each, and two special tokens make seven: truncated. "zzz" is the one unknown of 1 + 4.
    record(workdir, inputs, ["zzz", "the film is very good"])
    record(workdir, inputs, ["der Film"], "de")
    first, second = token_counts.read_token_counts(workdir)
    assert dataclasses.astuple(first) == ("test", "en", 2, 1, 6, 6, "word", 0.2)
    assert first.fertility == 1
    assert (second.language, second.tokens, second.unknown) == ("de", 2, 0)


def test_a_language_is_recorded_once(tmp_path, inputs):
    workdir = Workdir(tmp_path)
    record(workdir, inputs, ["the film"])
    record(workdir, inputs, ["the film"])
    assert len(token_counts.read_token_counts(workdir)) == 1


def test_lines_that_are_no_counts_are_skipped(tmp_path, inputs):
    workdir = Workdir(tmp_path)
    record(workdir, inputs, ["the film"])
    with workdir.tokens.open("ab") as file:
        file.write(b'{"split": "te\n[]\n')
    assert len(token_counts.read_token_counts(workdir)) == 1
