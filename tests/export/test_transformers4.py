"""Exports load in the oldest transformers that they promise to, with the same ids.

XTRANSFER_TRANSFORMERS4 names a folder with the packages of launch/transformers4.lock, which `.ci/run` installs:

    .venv/bin/python -m pip install --no-deps --target DIR --requirement launch/transformers4.lock
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import tiny_run, tokenizers_of_each_kind
from xtransfer.export import __main__ as export
from xtransfer.models.hf.tokenizer import save_tokenizer

FOLDER = os.environ.get("XTRANSFER_TRANSFORMERS4", "")
pytestmark = pytest.mark.skipif(not FOLDER, reason="XTRANSFER_TRANSFORMERS4 names no folder; .ci/run makes one")

TEXTS = ["the film is good", "naïve schönste Bücher, 東京!", "unknown ☃ 🎈 бой", " two  blanks ", "good"]
PROGRAM = """
import json, sys
import transformers
from transformers import AutoConfig, AutoTokenizer
assert transformers.__version__ == "4.40.0", transformers.__version__
texts = json.loads(sys.argv[1])
found = {}
for directory in sys.argv[2:]:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    found[directory] = [tokenizer(texts)["input_ids"], tokenizer(texts[0], texts[1]), tokenizer.model_max_length]
    found[directory][1] = dict(found[directory][1])
print(json.dumps([found, AutoConfig.from_pretrained(sys.argv[2]).id2label]))
"""


def test_exports_load_in_transformers_4_with_the_same_ids(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    workdir = tiny_run.workdir(tiny_run.setting(tmp_path), tmp_path / "run", "--config.objectives=('vanilla',)")
    exported = tmp_path / "exported"
    export.main(["--workdir", str(workdir.root), "--objective", "vanilla", "--seed", "0", "--output", str(exported)])
    directories = [exported]
    for kind in tokenizers_of_each_kind.KINDS:
        directories.append(tmp_path / kind)
        directories[-1].mkdir()
        save_tokenizer(tokenizers_of_each_kind.trained(kind), directories[-1])
        (directories[-1] / "config.json").write_text('{"model_type": "bert"}')
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, program, json.dumps(TEXTS), *map(str, directories)]
    environment = {**os.environ, "PYTHONPATH": FOLDER}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    found, id2label = json.loads(result.stdout)
    assert id2label == {"0": "bad", "1": "good"}
    for directory in map(str, directories):
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        pair = dict(tokenizer(TEXTS[0], TEXTS[1]))
        assert found[directory] == [tokenizer(TEXTS)["input_ids"], pair, tokenizer.model_max_length], directory
