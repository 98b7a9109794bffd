"""Tokens on disk: tokenised once, whole or not at all, in memory that does not grow, remade when damaged."""

import errno
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.test_text import SPECIAL, WORDS
from xtransfer.data import text, token_cache
from xtransfer.data.token_cache import TokenCache, texts_fingerprint
from xtransfer.errors import UserError

TEXTS = [" ".join(["good", "bad", "books", "a", "b"][i % 3 : 2 + i % 4]) for i in range(40)]
PAIRS = TEXTS[::-1]
MAX_LENGTH = 8


def make_tokenizer(words: tuple[str, ...] = (*SPECIAL, *WORDS)) -> SimpleNamespace:
    """What tokenising needs of a tokenizer, without the seconds that importing transformers takes a process."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    backend = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return SimpleNamespace(
        backend_tokenizer=backend,
        num_special_tokens_to_add=lambda pair: backend.num_special_tokens_to_add(pair),
        truncation_side="right",
        split_special_tokens=False,
        model_input_names=["input_ids", "token_type_ids"],
    )


@pytest.fixture(scope="module")
def tokenizer() -> SimpleNamespace:
    return make_tokenizer()


@pytest.fixture(autouse=True)
def keep_everything(monkeypatch):
    monkeypatch.setattr(token_cache, "_WORTH_KEEPING", 0)
    monkeypatch.setattr(text, "_CHUNK", 5)


def tokenised(cache: TokenCache, texts=TEXTS, pairs=None):
    """(tokens, examples that were tokenised for them)"""
    heard: list[int] = []
    tokens = cache.tokens(texts, pairs, on_batch=heard.append)
    return tokens, sum(heard)


def assert_same(tokens: text.Tokens, expected: text.Tokens) -> None:
    for name in token_cache.ARRAYS:
        np.testing.assert_array_equal(getattr(tokens, name), getattr(expected, name))
        assert getattr(tokens, name).dtype == getattr(expected, name).dtype
    assert tokens.clipped == expected.clipped


def entries(directory: Path) -> list[Path]:
    """All that lies in the cache beside its lock."""
    return [path for path in directory.iterdir() if path.name != ".tokenising.lock"]


def child(directory: Path, body: str) -> subprocess.Popen:
    """A process with a `cache` of MAX_LENGTH in the directory that runs `body`."""
    script = [
        "import os, signal, sys, time",
        "from tests.test_token_cache import MAX_LENGTH, PAIRS, TEXTS, TokenCache, make_tokenizer, text, token_cache",
        "token_cache._WORTH_KEEPING, text._CHUNK = 0, 5",
        f"cache = TokenCache(token_cache.Path({str(directory)!r}), make_tokenizer(), MAX_LENGTH)",
        body,
    ]
    return subprocess.Popen([sys.executable, "-c", "\n".join(script)], stdout=subprocess.PIPE, text=True)


@given(
    st.lists(st.tuples(*[st.text(st.sampled_from("ab 本god[]"), max_size=20)] * 2), max_size=12),
    st.booleans(),
)
def test_tokens_written_and_reopened_are_those_of_tokenize(tokenizer, tmp_path_factory, examples, paired):
    texts, pairs = [a for a, _ in examples], [b for _, b in examples] if paired else None
    cache = TokenCache(tmp_path_factory.mktemp("cache"), tokenizer, MAX_LENGTH)
    expected = text.tokenize(tokenizer, texts, pairs, MAX_LENGTH)
    written, done = tokenised(cache, texts, pairs)
    assert_same(written, expected)
    assert done == len(texts)
    reopened, done = tokenised(cache, texts, pairs)
    assert_same(reopened, expected)
    assert done == 0


def test_a_second_start_does_not_tokenise(tokenizer, tmp_path, monkeypatch):
    expected, _ = tokenised(TokenCache(tmp_path / "deep" / "cache", tokenizer, MAX_LENGTH), TEXTS, PAIRS)

    def fail(*arguments):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(text, "_encode", fail)
    again = TokenCache(tmp_path / "deep" / "cache", make_tokenizer(), MAX_LENGTH).tokens(TEXTS, PAIRS)
    assert_same(again, expected)
    with pytest.raises(AssertionError, match="tokenised again"):
        TokenCache(tmp_path, tokenizer, MAX_LENGTH).tokens(TEXTS, PAIRS)


def test_reopened_arrays_are_read_only_maps_of_the_files(tokenizer, tmp_path):
    tokens, _ = tokenised(TokenCache(tmp_path, tokenizer, MAX_LENGTH))
    for name in token_cache.ARRAYS:
        array = getattr(tokens, name)
        assert type(array) is np.ndarray and isinstance(array.base, np.memmap) and not array.flags.writeable
    assert tokens.item(1)[0].tolist() == text.tokenize(tokenizer, TEXTS[1:2], None, MAX_LENGTH).input_ids.tolist()


def test_whatever_decides_the_tokens_has_an_entry_of_its_own(tokenizer, tmp_path):
    other = make_tokenizer((*SPECIAL, *WORDS[::-1]))
    settings = [
        (tokenizer, MAX_LENGTH, TEXTS, None),
        (tokenizer, MAX_LENGTH, TEXTS, PAIRS),
        (tokenizer, MAX_LENGTH, PAIRS, TEXTS),
        (tokenizer, MAX_LENGTH, TEXTS[1:], None),
        (tokenizer, MAX_LENGTH + 1, TEXTS, None),
        (other, MAX_LENGTH, TEXTS, None),
    ]
    for number, (each, length, texts, pairs) in enumerate(settings):
        tokens, done = tokenised(TokenCache(tmp_path, each, length), texts, pairs)
        assert done == len(texts) and len(entries(tmp_path)) == number + 1
        assert_same(tokens, text.tokenize(each, texts, pairs, length))
    for each, length, texts, pairs in settings:
        assert tokenised(TokenCache(tmp_path, each, length), texts, pairs)[1] == 0


@pytest.mark.parametrize("change", ["format", "library", "limit"])
def test_what_another_version_wrote_is_not_read(tokenizer, tmp_path, monkeypatch, change):
    cache = TokenCache(tmp_path, tokenizer, MAX_LENGTH)
    tokenised(cache)
    if change == "format":
        monkeypatch.setattr(token_cache, "FORMAT", 0)
    elif change == "library":
        monkeypatch.setattr(token_cache.importlib.metadata, "version", lambda name: "0.0")
    else:
        monkeypatch.setattr(text, "_CHARACTERS_PER_TOKEN", 1)
    assert tokenised(cache)[1] == len(TEXTS)


sides = st.lists(st.text(max_size=3), max_size=4)


@given(st.tuples(sides, st.none() | sides), st.tuples(sides, st.none() | sides))
def test_fingerprints_are_equal_where_the_texts_are(one, other):
    assert (texts_fingerprint(*one) == texts_fingerprint(*other)) == (one == other)
    assert texts_fingerprint(*one) == texts_fingerprint(*one)


def test_fingerprints_tell_where_texts_end():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_cache, "_HASHED_TOGETHER", 2)
        found = {
            texts_fingerprint(texts, pairs)
            for texts, pairs in [
                (["ab", "c", "d"], None),
                (["a", "bc", "d"], None),
                (["a", "b", "cd"], None),
                (["d", "c", "ab"], None),
                (["ab"], ["cd"]),
                (["ab", "cd"], None),
                (["ab", "cd"], []),
                (["\ud800"], None),
            ]
        }
    assert len(found) == 8


@pytest.mark.parametrize(
    "moment",
    [
        "cache.tokens(TEXTS, PAIRS, on_batch=lambda b: os.kill(os.getpid(), signal.SIGKILL))",
        "text._encode = lambda *a, f=text._encode: f(*a) if a[2] < 30 else os.kill(os.getpid(), signal.SIGKILL)",
        "token_cache._publish = lambda *a: os.kill(os.getpid(), signal.SIGKILL)",
        "token_cache.os.rename = lambda *a: os.kill(os.getpid(), signal.SIGKILL)",
    ],
)
def test_a_killed_writer_leaves_rubbish_that_the_next_one_removes(tokenizer, tmp_path, moment):
    process = child(tmp_path, f"{moment}\ncache.tokens(TEXTS, PAIRS)")
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert [path.suffix for path in entries(tmp_path)] == [".tmp"]
    cache = TokenCache(tmp_path, tokenizer, MAX_LENGTH)
    other, _ = tokenised(cache, TEXTS)  # another entry than the killed one's
    assert [path.suffix for path in entries(tmp_path)] == [""]
    tokens, done = tokenised(cache, TEXTS, PAIRS)
    assert done == len(TEXTS) and len(entries(tmp_path)) == 2
    assert_same(tokens, text.tokenize(tokenizer, TEXTS, PAIRS, MAX_LENGTH))


def test_of_two_processes_one_tokenises_and_both_have_the_tokens(tokenizer, tmp_path):
    body = "\n".join(
        [
            "done = []",
            "def slowly(count):",
            "    done.append(count); time.sleep(0.1)",
            "tokens = cache.tokens(TEXTS, PAIRS, on_batch=slowly)",
            "print(sum(done), tokens.input_ids.sum())",
        ]
    )
    processes = [child(tmp_path, body) for _ in range(2)]
    said = [process.communicate()[0].split() for process in processes]
    expected = text.tokenize(tokenizer, TEXTS, PAIRS, MAX_LENGTH)
    assert sorted(int(done) for done, _ in said) == [0, len(TEXTS)]
    assert {int(total) for _, total in said} == {int(expected.input_ids.sum())}
    assert len(entries(tmp_path)) == 1
    assert_same(TokenCache(tmp_path, tokenizer, MAX_LENGTH).tokens(TEXTS, PAIRS), expected)


def flip(content: bytes) -> bytes:
    return content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]


DAMAGE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "flipped": lambda path: path.write_bytes(flip(path.read_bytes())),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("name", [*(f"{name}.npy" for name in token_cache.ARRAYS), "manifest.json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_made_again(tokenizer, tmp_path, caplog, name, damage):
    cache = TokenCache(tmp_path, tokenizer, MAX_LENGTH)
    tokenised(cache)
    (entry,) = entries(tmp_path)
    DAMAGE[damage](entry / name)
    with caplog.at_level(logging.WARNING):
        tokens, done = tokenised(cache)
    assert done == len(TEXTS) and entries(tmp_path) == [entry]
    assert caplog.text.count(f"{entry}: damaged") == 1
    assert_same(tokens, text.tokenize(tokenizer, TEXTS, None, MAX_LENGTH))
    assert tokenised(cache)[1] == 0


@pytest.mark.parametrize("content", ["[]", "{}", '{"key": NaN}', '{"key": null, "files": {}}'])
def test_a_manifest_of_something_else_is_not_believed(tokenizer, tmp_path, content):
    cache = TokenCache(tmp_path, tokenizer, MAX_LENGTH)
    tokenised(cache)
    (entry,) = entries(tmp_path)
    (entry / "manifest.json").write_text(content)
    assert tokenised(cache)[1] == len(TEXTS)


@pytest.mark.parametrize("limit", [64, 300])  # bytes: within the header, within the tokens
def test_a_disk_that_cannot_take_it_is_an_error_with_the_path(tokenizer, tmp_path, limit):
    cache = TokenCache(tmp_path, tokenizer, MAX_LENGTH)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(UserError, match=f"{tmp_path}.* cannot be written: File too large"):
            cache.tokens(TEXTS, None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert entries(tmp_path) == []
    assert tokenised(cache)[1] == len(TEXTS)


@pytest.mark.parametrize("call", ["mkdir", "fsync", "replace", "rename"])
def test_a_full_disk_is_an_error_with_the_path(tokenizer, tmp_path, monkeypatch, call):
    cache = TokenCache(tmp_path, tokenizer, MAX_LENGTH)
    tokenised(cache, PAIRS)
    before = entries(tmp_path)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(UserError, match=f"^{tmp_path}.* cannot be written: No space left on device"):
            cache.tokens(TEXTS, None)
    assert entries(tmp_path) == before
    assert tokenised(cache)[1] == len(TEXTS) and tokenised(cache, PAIRS)[1] == 0


def test_a_directory_that_cannot_be_one_is_an_error(tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"^{tmp_path}/file/cache cannot be written to"):
        TokenCache(tmp_path / "file" / "cache", tokenizer, MAX_LENGTH).tokens(TEXTS, None)


def test_an_error_of_the_tokenizer_or_the_caller_leaves_nothing(tokenizer, tmp_path):
    cache = TokenCache(tmp_path, tokenizer, MAX_LENGTH)
    with pytest.raises(UserError, match=r"^example 40: the tokenizer fails on 'a \\ud800'"):
        cache.tokens([*TEXTS, "a \ud800"], None)
    assert entries(tmp_path) == []

    def broken(done: int) -> None:
        raise BrokenPipeError("the terminal is gone")

    with pytest.raises(BrokenPipeError):
        cache.tokens(TEXTS, None, on_batch=broken)
    assert entries(tmp_path) == []


def test_clipped_texts_are_told_of_every_time(tokenizer, tmp_path, caplog):
    cache = TokenCache(tmp_path, tokenizer, MAX_LENGTH)
    for done in (7, 0):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            tokens, heard = tokenised(cache, ["a"] * 5 + ["good " * 100] * 2)
        assert tokens.clipped == 2 and heard == done
        assert "2 of 7 examples had texts of over 160 characters" in caplog.text


def test_little_text_and_no_directory_keep_nothing(tokenizer, tmp_path, monkeypatch):
    assert tokenised(TokenCache(None, tokenizer, MAX_LENGTH))[1] == len(TEXTS)
    size = sum(map(len, TEXTS))
    monkeypatch.setattr(token_cache, "_WORTH_KEEPING", size + 1)
    cache = TokenCache(tmp_path, tokenizer, MAX_LENGTH)
    for _ in range(2):
        tokens, done = tokenised(cache)
        assert done == len(TEXTS) and list(tmp_path.iterdir()) == []
    assert_same(tokens, text.tokenize(tokenizer, TEXTS, None, MAX_LENGTH))
    tokenised(cache, TEXTS, PAIRS)
    assert len(entries(tmp_path)) == 1  # both sides count


def test_memory_does_not_grow_with_the_examples(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "_CHUNK", 100)
    peaks = []
    for n in (2_000, 20_000):
        texts = ["good bad books"] * n
        cache = TokenCache(tmp_path / str(n), tokenizer, MAX_LENGTH)
        tracemalloc.start()
        cache.tokens(texts, None)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]


def test_a_file_in_the_place_of_an_entry_gives_way(tokenizer, tmp_path):
    cache = TokenCache(tmp_path, tokenizer, MAX_LENGTH)
    tokenised(cache)
    (entry,) = entries(tmp_path)
    shutil.rmtree(entry)
    entry.write_text("in the way")
    assert tokenised(cache)[1] == len(TEXTS) and entry.is_dir()
