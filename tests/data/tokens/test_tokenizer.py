"""Bulk tokenisation gives the ids of the tokenizer, in bounded memory, and its errors name the example."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.caching import SPECIAL, WORDS
from xtransfer.data.tokens import tokenizer as tokenization
from xtransfer.errors import UserError


def write_tokenizer(path: Path) -> Path:
    """Write the files of a BERT tokenizer with SPECIAL and WORDS as its vocabulary, and return the directory."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordPiece({w: i for i, w in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    settings = dict(zip(names, SPECIAL, strict=True))
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=inputs, **settings).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(directory: Path):
    return tokenization.load_tokenizer(directory)


class FakeTokenizer:
    """A tokenizer whose backend encodes with the given function."""

    truncation_side, split_special_tokens = "right", False

    def __init__(self, tokenizer, encode: Callable) -> None:
        self.model_input_names = tokenizer.model_input_names
        self.num_special_tokens_to_add = tokenizer.num_special_tokens_to_add
        self.no_padding = tokenizer.backend_tokenizer.no_padding
        self.enable_truncation = tokenizer.backend_tokenizer.enable_truncation
        self.no_truncation = tokenizer.backend_tokenizer.no_truncation
        self.backend_tokenizer = self
        self.encode_batch_fast = lambda batch, add_special_tokens: encode(batch)


def copy_tokenizer(directory: Path, target: Path, **changes) -> Path:
    """Copy the files of the tokenizer, replacing keys of tokenizer.json, and return the target."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (target / name).write_text((directory / name).read_text())
    content = json.loads((target / "tokenizer.json").read_text())
    (target / "tokenizer.json").write_text(json.dumps(content | changes))
    return target


def test_single_texts_are_tokenised(tokenizer):
    tokens = tokenization.tokenize(tokenizer, ["good books", "", "本 x"], None, 8)
    assert [tokens.item(i)[0].tolist() for i in range(3)] == [[2, 5, 7, 8, 3], [2, 3], [2, 11, 1, 3]]
    assert len(tokens) == 3 and tokens.lengths.tolist() == [5, 2, 4] and tokens.truncated.tolist() == [False] * 3
    assert tokens.offsets.tolist() == [0, 5, 7, 11] and not tokens.token_type_ids.any()
    assert (tokens.input_ids.dtype, tokens.token_type_ids.dtype, tokens.offsets.dtype) == (np.int32, np.uint8, np.int64)


def test_pairs_are_tokenised_and_truncated(tokenizer):
    tokens = tokenization.tokenize(tokenizer, ["a", "good good good good"], ["bad b", "b"], 6)
    assert tokens.item(0)[0].tolist() == [2, 9, 3, 6, 10, 3]
    assert tokens.item(0)[1].tolist() == [0, 0, 0, 1, 1, 1]
    assert tokens.item(1)[0].tolist() == [2, 5, 5, 3, 10, 3]  # the longer side is cut
    assert tokenization.tokenize(tokenizer, ["good " * 50], None, 5).item(0)[0].tolist() == [2, 5, 5, 5, 3]


def test_type_ids_are_zero_if_the_model_does_not_take_them(directory):
    """A transformers tokenizer returns only what its model_input_names list, and we follow it."""
    with_types, without_types = tokenization.load_tokenizer(directory), tokenization.load_tokenizer(directory)
    without_types.model_input_names = ["input_ids", "attention_mask"]
    texts, pairs = ["a", "b"], ["bad b", "a"]
    typed = tokenization.tokenize(with_types, texts, pairs, 8)
    untyped = tokenization.tokenize(without_types, texts, pairs, 8)
    np.testing.assert_array_equal(typed.input_ids, untyped.input_ids)
    assert typed.token_type_ids.any() and not untyped.token_type_ids.any() and untyped.token_type_ids.dtype == np.uint8
    assert len(untyped.token_type_ids) == len(untyped.input_ids) and "token_type_ids" not in without_types("a", "b")
    assert tokenization.tokenizer_fingerprint(with_types) != tokenization.tokenizer_fingerprint(without_types)


@pytest.mark.parametrize("model_type", ["bert", "own"])
def test_code_in_the_directory_of_a_tokenizer_is_never_run(directory, tmp_path, model_type):
    copy_tokenizer(directory, tmp_path)
    for name, key in (("tokenizer_config.json", "AutoTokenizer"), ("config.json", "AutoConfig")):
        value = ["evil.Evil", "evil.Evil"] if key == "AutoTokenizer" else "evil.Evil"
        path = tmp_path / name
        content = json.loads(path.read_text()) if path.is_file() else {"model_type": model_type}
        path.write_text(json.dumps(content | {"auto_map": {key: value}, "tokenizer_class": "Evil"}))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    with contextlib.suppress(UserError):  # either refused, or loaded without the code
        tokenization.tokenize(tokenization.load_tokenizer(tmp_path), ["a"], None, 8)
    assert not (tmp_path / "ran").exists()


lists_of_texts = st.lists(st.text(st.sampled_from("ab 本god[]"), max_size=30), max_size=12)


@given(lists_of_texts, st.integers(1, 5), st.integers(1, 60), st.booleans())
def test_ids_equal_those_of_the_tokenizer_for_any_chunk_size(tokenizer, texts, chunk, characters, paired):
    pairs = texts[::-1] if paired else None
    batch_sizes: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenization, "_CHUNK", chunk)
        patch.setattr(tokenization, "_CHUNK_CHARACTERS", characters)
        tokens = tokenization.tokenize(tokenizer, texts, pairs, 8, on_batch=batch_sizes.append)
    assert sum(batch_sizes) == len(tokens) == len(texts) and all(0 < size <= chunk for size in batch_sizes)
    if texts:
        expected = tokenizer(texts, pairs, truncation="longest_first", max_length=8, return_token_type_ids=True)
        assert [tokens.item(i)[0].tolist() for i in range(len(texts))] == expected["input_ids"]
        assert [tokens.item(i)[1].tolist() for i in range(len(texts))] == expected["token_type_ids"]


def test_each_call_of_the_tokenizer_has_a_bounded_number_of_examples_and_characters(tokenizer, monkeypatch):
    calls: list[list[str]] = []

    def spy(batch):
        calls.append(batch)
        return tokenizer.backend_tokenizer.encode_batch_fast(batch)

    monkeypatch.setattr(tokenization, "_CHUNK", 3)
    monkeypatch.setattr(tokenization, "_CHUNK_CHARACTERS", 200)
    texts = ["a"] * 4 + ["b" * 10_000] * 3  # the tokenizer sees 160 characters of each
    tokenization.tokenize(FakeTokenizer(tokenizer, spy), texts, None, 8)
    assert [len(call) for call in calls] == [3, 3, 1] and [len(x) for x in calls[1]] == [1, 160, 160]


def test_the_settings_of_the_tokenizer_are_respected(directory):
    tokenizer = tokenization.load_tokenizer(directory)
    tokenizer.truncation_side = "left"
    assert tokenization.tokenize(tokenizer, ["good a b"], None, 4).item(0)[0].tolist() == [2, 9, 10, 3]
    assert tokenization.tokenize(tokenizer, ["a[SEP]"], None, 8).item(0)[0].tolist() == [2, 9, 3, 3]
    tokenizer.split_special_tokens = True
    assert tokenization.tokenize(tokenizer, ["a[SEP]"], None, 8).item(0)[0].tolist() == [2, 9, 1, 1, 1, 3]
    tokenizer(["a", "a b"], padding="max_length", max_length=20)  # the padding of an earlier call does not persist
    assert tokenization.tokenize(tokenizer, ["a", "a b"], None, 8).lengths.tolist() == [3, 4]


def test_no_texts_give_empty_arrays(tokenizer):
    tokens = tokenization.tokenize(tokenizer, [], None, 8)
    assert len(tokens) == 0 and tokens.offsets.tolist() == [0] and tokens.input_ids.dtype == np.int32


@given(st.lists(st.integers(0, 5), min_size=1, max_size=9), st.data())
def test_take_returns_examples_in_any_order_and_repeatedly(lengths: list[int], data: st.DataObject) -> None:
    """Take three examples at a time, so that several chunks are joined."""
    total = sum(lengths)
    ids, types = np.arange(total, dtype=np.int32), (np.arange(total) % 2).astype(np.uint8)
    truncated = np.arange(len(lengths)) % 3 == 0
    tokens = tokenization.Tokens(ids, types, np.cumsum([0, *lengths]), truncated)
    chosen = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=12))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenization, "_TAKEN", 3)
        taken = tokens.take(np.array(chosen, np.int64))
    assert (len(taken), taken.offsets.dtype) == (len(chosen), np.int64)
    assert taken.truncated.tolist() == [i % 3 == 0 for i in chosen]
    assert (taken.input_ids.dtype, taken.token_type_ids.dtype) == (np.int32, np.uint8)
    for position, index in enumerate(chosen):
        for actual, expected in zip(taken.item(position), tokens.item(index), strict=True):
            np.testing.assert_array_equal(actual, expected)
    assert taken.lengths.tolist() == [lengths[i] for i in chosen]


def test_take_reads_many_examples_without_a_python_loop() -> None:
    class Counted(np.ndarray):
        reads = 0

        def __getitem__(self, key: object) -> object:
            Counted.reads += 1
            return super().__getitem__(key)

    ids, n = np.arange(3000, dtype=np.int32), 1000
    types, truncated = ids.astype(np.uint8).view(Counted), np.zeros(n, bool)
    tokens = tokenization.Tokens(ids.view(Counted), types, 3 * np.arange(n + 1), truncated)
    taken = tokens.take(np.arange(n)[::-1])
    np.testing.assert_array_equal(np.asarray(taken.input_ids).reshape(n, 3), ids.reshape(n, 3)[::-1])
    assert Counted.reads == 2


def test_concatenate_joins_parts() -> None:
    parts = [
        tokenization.Tokens(
            np.array([1, 2, 3], np.int32), np.array([0, 0, 1], np.uint8), np.array([0, 2, 3]), np.array([True, False])
        ),
        tokenization.Tokens(np.array([4], np.int32), np.array([1], np.uint8), np.array([0, 1]), np.array([True])),
    ]
    joined = tokenization.concatenate(parts)
    assert (joined.input_ids.tolist(), joined.token_type_ids.tolist()) == ([1, 2, 3, 4], [0, 0, 1, 1])
    assert (joined.offsets.tolist(), joined.truncated.tolist()) == ([0, 2, 3, 4], [True, False, True])
    assert tokenization.concatenate(parts[:1]) is parts[0] and len(tokenization.concatenate([])) == 0


def test_a_huge_text_is_clipped_before_tokenisation(tokenizer):
    text_lengths: list[int] = []

    def spy(batch):
        text_lengths.extend(len(text) for example in batch for text in example)
        assert max(text_lengths) <= 160
        return tokenizer.backend_tokenizer.encode_batch_fast(batch)

    huge = "good " * 4_000_000
    tokens = tokenization.tokenize(FakeTokenizer(tokenizer, spy), ["a", huge, "b"], ["b", "a", huge], 8)
    assert text_lengths.count(160) == 2 and tokens.truncated.tolist() == [False, True, True]
    assert tokens.item(1)[0].tolist() == [2, 5, 5, 5, 5, 3, 9, 3]


@pytest.mark.parametrize("blanks", [" " * 4000, "\u200b" * 4000, " \ufeff\n" * 2000])
def test_blanks_around_a_text_do_not_count_towards_its_clipping(tokenizer, blanks):
    tokens = tokenization.tokenize(tokenizer, [f"{blanks}good books{blanks}", "a"], ["a", f"{blanks}b"], 12)
    assert tokens.item(0)[0].tolist() == [2, 5, 7, 8, 3, 9, 3] and tokens.item(1)[0].tolist() == [2, 9, 3, 10, 3]
    assert not tokens.truncated.any()


def test_a_text_of_more_than_max_length_tokens_is_truncated(tokenizer):
    """Six tokens of text are eight with the special ones; a pair has three of these."""
    texts, pairs = ["a " * 6, "a " * 7, "a" + " " * 200 + "b", "a" + " " * 200], ["a a", "a", "a a a a", "a " * 5]
    assert tokenization.tokenize(tokenizer, texts, None, 8).truncated.tolist() == [False, True, True, False]
    assert tokenization.tokenize(tokenizer, texts[:1] * 2, pairs[:2], 10).truncated.tolist() == [True, False]
    assert tokenization.tokenize(tokenizer, ["a"] * 2, [pairs[2], pairs[3] + "a"], 8).truncated.tolist() == [
        False,
        True,
    ]
    tokenizer.truncation_side = "left"
    assert tokenization.tokenize(tokenizer, texts, None, 8).truncated.tolist() == [False, True, True, False]
    tokenizer.truncation_side = "right"


@given(st.lists(st.text(st.sampled_from("ab 本god"), max_size=30), min_size=1, max_size=8), st.integers(3, 12))
def test_truncated_texts_are_those_with_more_tokens(tokenizer, texts, max_length):
    truncated = tokenization.tokenize(tokenizer, texts, None, max_length).truncated
    assert truncated.dtype == bool
    assert truncated.tolist() == [len(ids) > max_length for ids in tokenizer(texts, truncation=False)["input_ids"]]


def test_a_tokenizer_error_names_the_example(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenization, "_CHUNK", 2)
    with pytest.raises(UserError, match=r"^example 3: the tokenizer fails on 'a \\ud800'"):
        tokenization.tokenize(tokenizer, ["a", "b", "a", "a \ud800"], None, 8)
    with pytest.raises(UserError, match=r"^example 0: the tokenizer fails on 'a' \+ '\\udfff'"):
        tokenization.tokenize(tokenizer, ["a"], ["\udfff"], 8)


def test_an_example_without_tokens_is_an_error(directory, tmp_path):
    without_special_tokens = tokenization.load_tokenizer(copy_tokenizer(directory, tmp_path, post_processor=None))
    assert len(tokenization.tokenize(without_special_tokens, ["a"], None, 8).input_ids) == 1
    with pytest.raises(UserError, match="example 1: .*it gives no tokens"):
        tokenization.tokenize(without_special_tokens, ["a", " "], None, 8)


def test_a_type_id_above_255_is_an_error(directory, tmp_path):
    post_processor = {
        "type": "TemplateProcessing",
        "special_tokens": {},
        "single": [{"Sequence": {"id": "A", "type_id": 256}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
    }
    tokenizer = tokenization.load_tokenizer(copy_tokenizer(directory, tmp_path, post_processor=post_processor))
    with pytest.raises(UserError, match="example 0: .*token type ids go beyond 255"):
        tokenization.tokenize(tokenizer, ["a"], None, 8)


def test_a_max_length_without_room_for_text_and_unequal_pairs_are_errors(tokenizer):
    with pytest.raises(UserError, match="max_length 2 leaves no room for text beside 2 special tokens"):
        tokenization.tokenize(tokenizer, ["a"], None, 2)
    with pytest.raises(UserError, match="max_length 3 leaves no room"):
        tokenization.tokenize(tokenizer, ["a"], ["b"], 3)
    with pytest.raises(ValueError, match="1 texts but 2 second texts"):
        tokenization.tokenize(tokenizer, ["a"], ["b", "b"], 8)


def test_the_fingerprint_depends_only_on_the_tokenizer_files(directory, tmp_path):
    tokenizer = tokenization.load_tokenizer(directory)
    before = tokenization.tokenizer_fingerprint(tokenizer)
    tokenization.tokenize(tokenizer, ["a b"], None, 8)
    # Truncation has changed the state of the backend.
    assert tokenization.tokenizer_fingerprint(tokenizer) == before
    content = json.loads((directory / "tokenizer.json").read_text())
    content["model"]["vocab"]["new"] = len(SPECIAL + WORDS)
    other = tokenization.load_tokenizer(copy_tokenizer(directory, tmp_path, model=content["model"]))
    assert tokenization.tokenizer_fingerprint(other) != before


def test_the_error_for_missing_files_names_the_directory(tmp_path):
    with pytest.raises(UserError, match=f"^{tmp_path}: no tokenizer files"):
        tokenization.load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="nowhere: no tokenizer files"):
        tokenization.load_tokenizer(tmp_path / "nowhere")


def test_the_error_for_broken_files_names_the_directory_or_file(directory, tmp_path):
    pattern = {"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}
    with pytest.raises(UserError, match=f"^{tmp_path}: the tokenizer cannot be loaded") as caught:
        tokenization.load_tokenizer(copy_tokenizer(directory, tmp_path, pre_tokenizer=pattern))
    assert "\n" not in str(caught.value)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(UserError, match=f"^{tmp_path}/tokenizer.json: not valid JSON .*: download it again$"):
        tokenization.load_tokenizer(tmp_path)


def test_an_empty_vocabulary_is_an_error(directory, tmp_path):
    model = {"type": "WordPiece", "vocab": {w: i for i, w in enumerate(SPECIAL)}, "unk_token": "[UNK]"}
    model |= {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    with pytest.raises(UserError, match="no words beside its special tokens"):
        tokenization.load_tokenizer(copy_tokenizer(directory, tmp_path, model=model))


class Panic(BaseException):
    """A stand-in for PanicException of pyo3, which does not derive from Exception either."""


def test_a_panic_in_the_tokenizer_becomes_a_user_error(directory, tokenizer, monkeypatch):
    import transformers

    def panic(*args, **options):
        raise Panic("regex\nstack")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", panic)
    with pytest.raises(
        UserError, match=f"^{directory}: the tokenizer cannot be loaded: regex stack; download it again"
    ):
        tokenization.load_tokenizer(directory)
    with pytest.raises(UserError, match="example 0: the tokenizer fails on 'a': regex stack"):
        tokenization.tokenize(FakeTokenizer(tokenizer, panic), ["a", "b"], None, 8)


def test_ctrl_c_is_not_caught(directory, tokenizer, monkeypatch):
    import transformers

    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tokenization.load_tokenizer(directory)
    with pytest.raises(KeyboardInterrupt):
        tokenization.tokenize(FakeTokenizer(tokenizer, interrupt), ["a"], None, 8)
