"""A classifier for tests of the predict command, and functions that run the command on it."""

import json
from pathlib import Path
from typing import Any

import jax
import pytest

from tests.helpers import tiny
from xtransfer.data.tokens.tokenizer import load_tokenizer
from xtransfer.errors import UserError
from xtransfer.models.hf import checkpoint as hf_checkpoint
from xtransfer.models.hf import config as hf_config
from xtransfer.predict import __main__ as predict

LABELS = ("gut", "böse", "so-so")
Rows = list[dict[str, Any]]


def classifier(root: Path) -> Path:
    """Write a Hugging Face classifier with three classes, whose head gives different texts different labels."""
    base = tiny.checkpoint(root / "base")
    config = hf_config.read_config(base)
    graphdef, params = hf_checkpoint.load_classifier(base, len(LABELS), seed=1)
    params["head"] = jax.tree.map(lambda leaf: leaf * 50, params["head"])  # a random head gives all texts one label
    hf_checkpoint.save(root / "classifier", config, params, tokenizer=load_tokenizer(base), labels=LABELS)
    return root / "classifier"


def run(model: Path, source: Path, *flags: str) -> Rows:
    """Run the command and return the rows that it writes."""
    output = source.parent / f"{source.name}.out"
    predict.main(["--model", str(model), "--input", str(source), "--output", str(output), "--overwrite", *flags])
    assert not temporary(output).exists()
    return [json.loads(line) for line in output.read_text(encoding="utf-8").split("\n")[:-1]]


def temporary(output: Path) -> Path:
    """Return the path of the output while it is being written."""
    return output.with_name(f".{output.name}.tmp")


def error_of(model: Path, source: Path, *flags: str) -> str:
    """Run the command, which must fail and leave nothing behind, and return its one-line error."""
    with pytest.raises(UserError) as caught:
        run(model, source, *flags)
    assert {path.name for path in source.parent.iterdir()} <= {source.name}
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix(f"{source.parent}/")


def write(path: Path, content: str | bytes) -> Path:
    """Write a file and return its path."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path
