"""Memory maps of tokens give back the pages that were read, and read them again."""

import sys
from pathlib import Path

import numpy as np
import pytest

from xtransfer.data.tokens import pages
from xtransfer.data.tokens.pages import MappedPages
from xtransfer.data.tokens.tokenizer import Tokens

N, LENGTH = 1 << 18, 32  # 32 MiB of ids, 8 MiB of types


def resident_file_pages() -> int:
    """Return the bytes of mapped files that this process has in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssFile")).split()[1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("most", "least", "largest"), [(1 << 50, 36 << 20, 60 << 20), (1 << 20, -(8 << 20), 8 << 20)])
def test_pages_that_were_read_are_given_back(tmp_path: Path, monkeypatch, most: int, least: int, largest: int) -> None:
    monkeypatch.setattr(pages, "_MOST", most)
    ids = np.arange(N * LENGTH, dtype=np.int32)
    np.save(tmp_path / "ids.npy", ids)
    np.save(tmp_path / "types.npy", (ids % 2).astype(np.uint8))
    maps = [np.load(tmp_path / name, mmap_mode="r") for name in ("ids.npy", "types.npy")]
    tokens = Tokens(maps[0], maps[1], np.arange(N + 1) * LENGTH, np.zeros(N, bool), MappedPages(maps))
    before = resident_file_pages()
    for _ in range(2):
        for start in range(0, N, 1 << 14):
            taken = tokens.take(np.arange(start, start + (1 << 14)))
            assert np.array_equal(taken.input_ids, ids[start * LENGTH : (start + (1 << 14)) * LENGTH])
    assert least < resident_file_pages() - before < largest


def test_an_empty_array_has_no_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_MOST", 0)
    MappedPages([np.zeros(0, np.int32).view(np.memmap)]).read(3)
