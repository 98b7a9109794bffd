"""The record of package versions in a working directory."""

import json
from importlib import metadata

import pytest

from xtransfer.errors import CheckpointError
from xtransfer.runs import versions
from xtransfer.runs.workdir import Workdir


def test_the_first_start_records_the_installed_versions_silently(tmp_path, capsys):
    versions.note(Workdir(tmp_path))
    record = json.loads((tmp_path / "versions.json").read_text())
    assert record["packages"]["jax"] == metadata.version("jax") and record["format"] == 1
    assert set(record["packages"]) == {"xtransfer", "jax", "flax", "optax", "orbax-checkpoint", "numpy"}
    versions.note(Workdir(tmp_path))
    assert capsys.readouterr().out == ""


def test_upgraded_packages_are_named_once(tmp_path, capsys):
    versions.note(Workdir(tmp_path))
    record = json.loads((tmp_path / "versions.json").read_text())
    old = record | {"packages": record["packages"] | {"jax": "0.1.2"}}
    del old["packages"]["flax"]
    (tmp_path / "versions.json").write_text(json.dumps(old))
    versions.note(Workdir(tmp_path))
    jax, flax = metadata.version("jax"), metadata.version("flax")
    expected = f"packages differ from the last start (jax 0.1.2 → {jax}, flax ? → {flax}): numbers may differ"
    assert capsys.readouterr().out == f"{expected} in their last digits\n"
    versions.note(Workdir(tmp_path))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"format": 2}', "this directory has format 2, and this version reads 1"),
        ("[]", "expected a JSON object"),
    ],
)
def test_another_format_and_a_damaged_record_are_refused(tmp_path, content, message):
    (tmp_path / "versions.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        versions.note(Workdir(tmp_path))
    assert (tmp_path / "versions.json").read_text() == content
