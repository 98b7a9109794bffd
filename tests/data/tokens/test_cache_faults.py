"""Tokens on disk are whole or not there, whatever ends the process or fails; what is damaged is made again."""

import errno
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.helpers import caching
from tests.helpers.caching import MAX_LENGTH, PAIRS, TEXTS, assert_same, entries, make_tokenizer, tokenised
from xtransfer.data.tokens import cache as token_cache
from xtransfer.data.tokens import tokenizer as tokenization
from xtransfer.data.tokens.cache import TokenCache
from xtransfer.errors import UserError


@pytest.fixture(scope="module")
def tokenizer() -> SimpleNamespace:
    return make_tokenizer()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    caching.keep_everything(monkeypatch)


def child(directory: Path, body: str) -> subprocess.Popen:
    """A process with a `cache` of MAX_LENGTH in the directory that runs `body`."""
    script = [
        "import os, signal, sys, time",
        "from tests.helpers.caching import MAX_LENGTH, PAIRS, TEXTS, TokenCache, make_tokenizer",
        "from tests.helpers.caching import token_cache, tokenization",
        "token_cache._WORTH_KEEPING, tokenization._CHUNK = 0, 5",
        f"cache = TokenCache(token_cache.Path({str(directory)!r}), make_tokenizer(), MAX_LENGTH)",
        body,
    ]
    return subprocess.Popen([sys.executable, "-c", "\n".join(script)], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    "moment",
    [
        "cache.tokens(TEXTS, PAIRS, on_batch=lambda b: os.kill(os.getpid(), signal.SIGKILL))",
        "encode = tokenization._encode\n"
        "tokenization._encode = lambda *a: encode(*a) if a[2] < 30 else os.kill(os.getpid(), signal.SIGKILL)",
        "token_cache.storage.write_atomically = lambda *a: os.kill(os.getpid(), signal.SIGKILL)",
        "token_cache.storage.os.replace = lambda *a: os.kill(os.getpid(), signal.SIGKILL)",
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
    assert_same(tokens, tokenization.tokenize(tokenizer, TEXTS, PAIRS, MAX_LENGTH))


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
    expected = tokenization.tokenize(tokenizer, TEXTS, PAIRS, MAX_LENGTH)
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
    assert_same(tokens, tokenization.tokenize(tokenizer, TEXTS, None, MAX_LENGTH))
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


@pytest.mark.parametrize("call", ["mkdir", "fsync", "replace"])
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


def test_a_file_in_the_place_of_an_entry_gives_way(tokenizer, tmp_path):
    cache = TokenCache(tmp_path, tokenizer, MAX_LENGTH)
    tokenised(cache)
    (entry,) = entries(tmp_path)
    shutil.rmtree(entry)
    entry.write_text("in the way")
    assert tokenised(cache)[1] == len(TEXTS) and entry.is_dir()
