"""Compiled programs on disk: found by a second process, bounded, and harmless where they cannot be kept."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from tests.runtime.test_checksums import flipped
from xtransfer.runtime import compilation_cache

# Compile one program that takes long enough to be kept, and print whether JAX found it in the cache.
_PROGRAM = """
import sys
from pathlib import Path
import jax
import jax.numpy as jnp
from xtransfer.runtime import compilation_cache

events = []
jax.monitoring.register_event_listener(lambda name, **kwargs: events.append(name))
compilation_cache._MIN_SECONDS = 0.0
compilation_cache.enable(Path(sys.argv[1]))
print(float(jax.jit(lambda x: jnp.sin(x) @ x.T)(jnp.ones((3, 3))).sum()))
print("/jax/compilation_cache/cache_hits" in events)
"""


def _run(cache: Path, **environment: str) -> list[str]:
    variables = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    command = [sys.executable, "-c", _PROGRAM, str(cache)]
    done = subprocess.run(command, env=variables | environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


def _programs(cache: Path) -> list[Path]:
    return sorted((cache / "compiled").rglob("*-cache"))


def test_second_process_finds_the_programs_of_the_first(tmp_path: Path) -> None:
    first, second = _run(tmp_path), _run(tmp_path)
    assert (first[1], second[1]) == ("False", "True")
    assert first[0] == second[0]


def test_half_written_entry_is_removed_and_compiled_again(tmp_path: Path) -> None:
    first = _run(tmp_path)
    for program in _programs(tmp_path):  # as kill -9 between the program and its time of last use leaves them
        program.write_bytes(program.read_bytes()[:20])
        program.with_name(program.name.replace("-cache", "-atime")).unlink()
    assert _run(tmp_path) == first
    assert _run(tmp_path)[1] == "True"


@pytest.mark.parametrize("damage", ["flipped", "cut", "the list"])
def test_damaged_entry_is_removed_and_compiled_again(tmp_path: Path, damage: str) -> None:
    """JAX would warn at every start, for ever. `_run` refuses any warning."""
    first = _run(tmp_path)
    programs = _programs(tmp_path)
    for program in programs:
        content = program.read_bytes()
        middle = 8 * (len(content) // 2)
        program.write_bytes(content[:-9] if damage == "cut" else flipped(content, middle))
        if damage == "the list":
            program.write_bytes(content)
            (program.parent / "checksums.json").write_text("{")
    assert _run(tmp_path) == [first[0], str(damage == "the list")]
    assert _run(tmp_path)[1] == "True"
    assert set(json.loads((programs[0].parent / "checksums.json").read_text())) == {p.name for p in programs}


def test_folder_in_the_environment_is_used_instead(tmp_path: Path) -> None:
    _run(tmp_path / "ours", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "theirs"))
    assert not (tmp_path / "ours").exists()


def test_cache_that_cannot_be_written_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / "compiled").write_text("a file where the folder should be")
    assert _run(tmp_path)[1] == "False"


def test_folders_of_other_versions_go_after_a_month(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    now, day = time.time(), 24 * 3600
    for name, days in (("jax-0.1-old", 31), ("jax-0.2-recent", 29)):
        folder = tmp_path / "compiled" / name
        folder.mkdir(parents=True)
        os.utime(folder, (now - days * day, now - days * day))
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)
    monkeypatch.setattr(compilation_cache.compilation_cache, "reset_cache", lambda: None)
    compilation_cache.enable(tmp_path)
    left = {folder.name for folder in (tmp_path / "compiled").iterdir()}
    assert "jax-0.1-old" not in left
    assert "jax-0.2-recent" in left
    assert len(left) == 2  # ours is new


def test_processors_with_other_instructions_do_not_share(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = set()
    for flags in ("flags : sse avx", "flags : sse avx avx512f"):
        monkeypatch.setattr(Path, "read_text", lambda self, flags=flags, **kwargs: f"processor: 0\n{flags}\n")
        names.add(compilation_cache._processor())
    assert len(names) == 2
