"""A cache entry is complete or absent after any crash or failure, and a damaged one is written again."""

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
def cache_short_texts(monkeypatch):
    caching.keep_everything(monkeypatch)


def start_process(directory: Path, body: str) -> subprocess.Popen:
    """Start a process that runs `body`, in which `cache` is a token cache of MAX_LENGTH in the directory."""
    script = [
        "import os, signal, sys, time",
        "from xtransfer import storage",
        "from tests.helpers.caching import MAX_LENGTH, PAIRS, TEXTS, TokenCache, make_tokenizer",
        "from tests.helpers.caching import token_cache, tokenization",
        "token_cache._WORTH_KEEPING, tokenization._CHUNK = 0, 5",
        f"cache = TokenCache(token_cache.Path({str(directory)!r}), make_tokenizer(), MAX_LENGTH)",
        body,
    ]
    return subprocess.Popen([sys.executable, "-c", "\n".join(script)], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    "kill",
    [
        "cache.tokens(TEXTS, PAIRS, on_batch=lambda b: os.kill(os.getpid(), signal.SIGKILL))",
        "encode = tokenization.encode_each\n"
        "tokenization.encode_each = lambda *a: encode(*a) if a[2] < 30 else os.kill(os.getpid(), signal.SIGKILL)",
        "storage.write_atomically = lambda *a: os.kill(os.getpid(), signal.SIGKILL)",
        "storage.os.replace = lambda *a: os.kill(os.getpid(), signal.SIGKILL)",
    ],
)
def test_the_next_writer_removes_the_temporary_files_of_a_killed_one(tokenizer, tmp_path, kill):
    process = start_process(tmp_path, f"{kill}\ncache.tokens(TEXTS, PAIRS)")
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert [path.suffix for path in entries(tmp_path)] == [".tmp"]
    cache = TokenCache(tmp_path, tokenizer, MAX_LENGTH)
    tokenised(cache, TEXTS)  # a different entry from the one of the killed process
    assert [path.suffix for path in entries(tmp_path)] == [""]
    tokens, newly_tokenised = tokenised(cache, TEXTS, PAIRS)
    assert newly_tokenised == len(TEXTS) and len(entries(tmp_path)) == 2
    assert_same(tokens, tokenization.tokenize(tokenizer, TEXTS, PAIRS, MAX_LENGTH))


def test_one_of_two_processes_tokenises_and_both_get_the_tokens(tokenizer, tmp_path):
    body = "\n".join(
        [
            "done = []",
            "def slowly(count):",
            "    done.append(count); time.sleep(0.1)",
            "tokens = cache.tokens(TEXTS, PAIRS, on_batch=slowly)",
            "print(sum(done), tokens.input_ids.sum())",
        ]
    )
    processes = [start_process(tmp_path, body) for _ in range(2)]
    outputs = [process.communicate()[0].split() for process in processes]
    expected = tokenization.tokenize(tokenizer, TEXTS, PAIRS, MAX_LENGTH)
    assert sorted(int(newly_tokenised) for newly_tokenised, _ in outputs) == [0, len(TEXTS)]
    assert {int(total) for _, total in outputs} == {int(expected.input_ids.sum())}
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
def test_a_damaged_entry_is_replaced(tokenizer, tmp_path, caplog, name, damage):
    cache = TokenCache(tmp_path, tokenizer, MAX_LENGTH)
    tokenised(cache)
    (entry,) = entries(tmp_path)
    DAMAGE[damage](entry / name)
    with caplog.at_level(logging.WARNING):
        tokens, newly_tokenised = tokenised(cache)
    assert newly_tokenised == len(TEXTS) and entries(tmp_path) == [entry]
    assert caplog.text.count(f"{entry}: damaged") == 1
    assert_same(tokens, tokenization.tokenize(tokenizer, TEXTS, None, MAX_LENGTH))
    assert tokenised(cache)[1] == 0


@pytest.mark.parametrize("content", ["[]", "{}", '{"key": NaN}', '{"key": null, "files": {}}'])
def test_an_entry_with_an_invalid_manifest_is_replaced(tokenizer, tmp_path, content):
    cache = TokenCache(tmp_path, tokenizer, MAX_LENGTH)
    tokenised(cache)
    (entry,) = entries(tmp_path)
    (entry / "manifest.json").write_text(content)
    assert tokenised(cache)[1] == len(TEXTS)


@pytest.mark.parametrize("limit", [64, 300])  # bytes: inside the header, inside the tokens
def test_a_failed_write_is_an_error_that_names_the_path(tokenizer, tmp_path, limit):
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
def test_a_full_disk_is_an_error_that_names_the_path(tokenizer, tmp_path, monkeypatch, call):
    cache = TokenCache(tmp_path, tokenizer, MAX_LENGTH)
    tokenised(cache, PAIRS)
    before = entries(tmp_path)

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(UserError, match=f"^{tmp_path}.* cannot be written: No space left on device"):
            cache.tokens(TEXTS, None)
    assert entries(tmp_path) == before
    assert tokenised(cache)[1] == len(TEXTS) and tokenised(cache, PAIRS)[1] == 0


def test_a_cache_directory_below_a_file_is_an_error(tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"^{tmp_path}/file/cache cannot be written to"):
        TokenCache(tmp_path / "file" / "cache", tokenizer, MAX_LENGTH).tokens(TEXTS, None)


def test_an_error_in_the_tokenizer_or_the_callback_leaves_no_entry(tokenizer, tmp_path):
    cache = TokenCache(tmp_path, tokenizer, MAX_LENGTH)
    with pytest.raises(UserError, match=r"^example 40: the tokenizer fails on 'a \\ud800'"):
        cache.tokens([*TEXTS, "a \ud800"], None)
    assert entries(tmp_path) == []

    def fail(count: int) -> None:
        raise BrokenPipeError("the terminal is gone")

    with pytest.raises(BrokenPipeError):
        cache.tokens(TEXTS, None, on_batch=fail)
    assert entries(tmp_path) == []


def test_a_file_with_the_name_of_an_entry_is_replaced(tokenizer, tmp_path):
    cache = TokenCache(tmp_path, tokenizer, MAX_LENGTH)
    tokenised(cache)
    (entry,) = entries(tmp_path)
    shutil.rmtree(entry)
    entry.write_text("in the way")
    assert tokenised(cache)[1] == len(TEXTS) and entry.is_dir()
