"""Files that claim to be huge are refused in bounded time and memory, by a process that has little of both."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import tiny

ROOT = Path(__file__).parents[1]
# Every case ends in one line of a UserError, or in "read". A process over its limits is killed, or fails.
CASES = """
import json, resource, sys
from pathlib import Path
import jax
from xtransfer.data.formats import tables
from xtransfer.data.tokens.tokenizer import load_tokenizer, tokenize
from xtransfer.errors import UserError
from xtransfer.models.hf import checkpoint

root, tokenizer = Path(sys.argv[1]), load_tokenizer(sys.argv[1] + "/plain")
checkpoint.load_classifier(root / "plain", 2, seed=0, labels=("bad", "good"))  # import and compile before the limits

def load(directory):
    checkpoint.load_classifier(directory, 2, seed=0, labels=("bad", "good"))

def encode(directory):
    tokenize(load_tokenizer(directory), ["a" * 100 + "!"], None, 16)

def read(path):
    texts = [row.text for row in tables.read_texts(tables.inspect(path, "text", None, None, skip_empty=False))]
    assert len(tokenize(tokenizer, texts, None, 16)) == 1

with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 29), used + (1 << 29)))
seconds = int(resource.getrusage(resource.RUSAGE_SELF).ru_utime) + 30
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
for name in sys.argv[2:]:
    kind = name.partition("-")[0]
    work = {"model": load, "tokenizer": encode, "text": read}[kind]
    try:
        work(root / name)
        print(json.dumps([name, "read"]), flush=True)
    except UserError as error:
        assert str(error).isprintable()
        print(json.dumps([name, str(error)]), flush=True)
"""


def edit(path: Path, **values: object) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | values), encoding="utf-8")


def model(root: Path, name: str, **settings: object) -> Path:
    directory = tiny.checkpoint(root / name)
    edit(directory / "config.json", **settings)
    return directory


def split(regex: str) -> dict[str, object]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def write_models(root: Path) -> dict[str, str]:
    """Write checkpoints with wrong sizes, and return a part of the message for each."""
    model(root, "model-layers", num_hidden_layers=1_000_000)
    model(root, "model-wide", hidden_size=1 << 40)
    model(root, "model-embedding", vocab_size=(8 << 30) // 64)
    model(root, "model-positions", max_position_embeddings=1 << 24)
    model(root, "model-digits")
    (root / "model-digits" / "config.json").write_text('{"model_type": "bert", "vocab_size": ' + "9" * 100_000 + "}")
    with (model(root, "model-config") / "config.json").open("r+b") as file:
        file.truncate(1 << 40)
    weights = "model.safetensors"
    (model(root, "model-header") / weights).write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    (model(root, "model-header-100-mb") / weights).write_bytes(struct.pack("<Q", 99_000_000) + b"{}")
    claim = {"bert.embeddings.word_embeddings.weight": {"dtype": "F32", "shape": [1 << 27, 16]}}
    claim["bert.embeddings.word_embeddings.weight"]["data_offsets"] = [0, 8 << 30]
    header = json.dumps(claim).encode()
    (model(root, "model-claim") / weights).write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    nested = b'{"a":' * 200_000 + b"1" + b"}" * 200_000
    (model(root, "model-nested") / weights).write_bytes(struct.pack("<Q", len(nested)) + nested)
    return {
        "model-layers": "num_hidden_layers is 1000000, expected at most 128",
        "model-wide": "hidden_size is 1099511627776, expected at most 16,777,216",
        "model-embedding": "vocab_size is 134217728, expected at most 16,777,216",
        "model-positions": "has shape [32, 16], the model of its config.json needs [16777216, 16]",
        "model-digits": "config.json: not valid JSON",
        "model-config": "config.json: over 256 MiB",
        "model-header": "not a complete safetensors file",
        "model-header-100-mb": "not a complete safetensors file",
        "model-claim": "not a complete safetensors file",
        "model-nested": "not a complete safetensors file",
    }


def write_tokenizers(root: Path) -> dict[str, str]:
    """Write tokenizers that would take forever or fill the memory, and return a part of the message for each."""
    for name, values in {
        "tokenizer-regex": {"pre_tokenizer": split("(a+)+$")},
        "tokenizer-alternatives": {"normalizer": {"type": "Replace", "pattern": {"Regex": "(a|aa)+$"}, "content": ""}},
        "tokenizer-growth": {
            "normalizer": {
                "type": "Sequence",
                "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 64}] * 12,
            }
        },
    }.items():
        edit(model(root, name) / "tokenizer.json", **values)
    nested = '{"type": "Sequence", "normalizers": [' * 100_000 + "]}" * 100_000
    file = model(root, "tokenizer-nested") / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": "HERE"}).replace('"HERE"', nested))
    with (model(root, "tokenizer-large") / "tokenizer.json").open("r+b") as file:
        file.truncate(1 << 40)
    return {
        "tokenizer-regex": "the tokenizer fails on",
        "tokenizer-alternatives": "the tokenizer fails on",
        "tokenizer-growth": "its normalizer makes a text over 64 times as long",
        "tokenizer-nested": "not valid JSON (nested too deeply)",
        "tokenizer-large": "tokenizer.json: over 256 MiB",
    }


def write_texts(root: Path) -> dict[str, str]:
    """Write files with one line of 20 MB. The text is read, and clipped before the tokenizer sees it."""
    line = "the film is very good " * (20_000_000 // 22)
    (root / "text-line.tsv").write_text(f"text\n{line}\n")
    (root / "text-line.csv").write_text(f'text\n"{line}"\n')
    (root / "text-line.jsonl").write_text(json.dumps({"text": line}) + "\n")
    (root / "text-nested.jsonl").write_text('{"text": ' + "[" * 1_000_000 + "]" * 1_000_000 + "}\n")
    (root / "text-columns.tsv").write_text("\t".join([*map(str, range(300_000)), "text", "text"]) + "\n")
    with (root / "text-keys.jsonl").open("w") as file:  # a comparison of every key with every other takes hours
        file.write("{" + "".join(f'"{i}": 1, ' for i in range(300_000)) + '"text": "a", "text": "b"}\n')
    read = dict.fromkeys(("text-line.tsv", "text-line.csv", "text-line.jsonl"), "read")
    return read | {
        "text-nested.jsonl": "text-nested.jsonl:1: malformed JSON: nested too deeply",
        "text-columns.tsv": "text-columns.tsv:1: column 'text' occurs twice in the header",
        "text-keys.jsonl": "text-keys.jsonl:1: malformed JSON: the key 'text' occurs twice",
    }


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("write", [write_models, write_tokenizers, write_texts])
def test_hostile_files_cost_little_time_and_memory(tmp_path, write):
    tiny.checkpoint(tmp_path / "plain")
    expected = write(tmp_path)
    command = [sys.executable, "-c", CASES, str(tmp_path), *expected]
    # Each arena of malloc reserves 64 MiB of addresses, and how many there are depends on how threads happen to run.
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200, env=environment)
    messages = dict(map(json.loads, result.stdout.splitlines()))
    assert list(messages) == list(expected) and result.returncode == 0, (messages, result.stderr[-2000:])
    for name, part in expected.items():
        assert part in messages[name], (name, messages[name])
        assert part == "read" or messages[name].startswith((str(tmp_path), "example 0: ")), messages[name]
