"""Token ids on disk, so that texts are tokenized only once: ragged arrays that are memory-mapped for reading.

    input_ids.npy        [total] int32
    token_type_ids.npy   [total] uint8
    offsets.npy          [n + 1] int64
    truncated.npy        [n] bool

Each entry (see `data.entries`) has these files. Its key hashes everything that decides the tokens.
"""

import contextlib
import hashlib
import importlib.metadata
import itertools
import os
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xtransfer.data.entries import Entry
from xtransfer.data.tokens import tokenizer as tokenization
from xtransfer.data.tokens.pages import MappedPages
from xtransfer.data.tokens.tokenizer import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT = 2  # 1 had no truncated.npy, and clipped texts with the blanks at their ends
ARRAYS: dict[str, np.dtype[Any]] = {
    "input_ids": np.dtype("<i4"),
    "token_type_ids": np.dtype("u1"),
    "offsets": np.dtype("<i8"),
    "truncated": np.dtype("?"),
}


# Tokenizing this much takes no longer than the fsyncs of an entry, and a cache of single sentences helps nobody.
_WORTH_KEEPING = 20_000  # characters
_HASHED_TOGETHER = 1000  # texts per update of the hash


@dataclass(frozen=True)
class TokenCache:
    """The tokens of one tokenizer at one length.

    Attributes:
      directory: holds the entries of any tokenizer and length; None keeps nothing.
      tokenizer: from `load_tokenizer`; do not change it afterwards.
      max_length: the most tokens of an example, with special ones.
    """

    directory: Path | None
    tokenizer: "PreTrainedTokenizerFast"
    max_length: int

    def tokens(
        self, texts: Sequence[str], pairs: Sequence[str] | None, *, on_batch: Callable[[int], None] | None = None
    ) -> Tokens:
        """Return the tokens that `tokenize` gives, from the disk or else from the tokenizer.

        Memory does not grow with the number of examples: the arrays are written batch by batch, and come back as
        read-only memory maps. A second process waits for the one that is tokenizing, and reads what it wrote.

        Args:
          texts: n texts.
          pairs: n second texts, or None.
          on_batch: called with the size of each tokenized batch, and not at all if everything is on the disk.

        Raises:
          UserError: see `tokenize_batches`; or the directory cannot be written (a full disk), with its path.
          ValueError: texts and pairs differ in number.
        """
        if self.directory is None or not _worth_keeping(texts, pairs):
            return tokenization.tokenize(self.tokenizer, texts, pairs, self.max_length, on_batch=on_batch)
        return self._cached(self.directory, texts, pairs, on_batch)

    def _cached(
        self,
        directory: Path,
        texts: Sequence[str],
        pairs: Sequence[str] | None,
        on_batch: Callable[[int], None] | None,
    ) -> Tokens:
        entry = Entry(
            directory,
            self._key(texts, pairs),
            {name: f"{name}.npy" for name in ARRAYS},
            _read,
            content="tokens",
            work="tokenizing the texts",
            lock="tokenizing",
        )

        def write() -> None:
            with contextlib.closing(self._write(entry, texts, pairs)) as batch_sizes:
                for size in batch_sizes:
                    if on_batch is not None:
                        on_batch(size)

        return entry.get(write)

    @cached_property
    def _fingerprint(self) -> str:
        return tokenization.tokenizer_fingerprint(self.tokenizer)  # takes a second for a large vocabulary

    def _key(self, texts: Sequence[str], pairs: Sequence[str] | None) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "tokenizer": self._fingerprint,
            "tokenizers": importlib.metadata.version("tokenizers"),  # another version may give other ids
            "max_length": self.max_length,
            "character_limit": tokenization.character_limit(self.max_length),
            "texts": texts_fingerprint(texts, pairs),
        }

    def _write(
        self, entry: Entry[Tokens], texts: Sequence[str], pairs: Sequence[str] | None
    ) -> Generator[int, None, None]:
        """Tokenize the texts into the entry, a batch at a time.

        Yields:
          The size of each batch. The caller reports progress outside this function, so that an error there is not
          taken for a failure of the disk.
        """
        with entry.written() as temporary, entry.disk_errors(), contextlib.ExitStack() as files:
            arrays = {name: files.enter_context(_GrowingArray(temporary, name)) for name in ARRAYS}
            arrays["offsets"].append(np.zeros(1, np.int64))
            for batch in tokenization.tokenize_batches(self.tokenizer, texts, pairs, self.max_length):
                arrays["offsets"].append(batch.offsets[1:] + arrays["input_ids"].length)
                arrays["input_ids"].append(batch.input_ids)
                arrays["token_type_ids"].append(batch.token_type_ids)
                arrays["truncated"].append(batch.truncated)
                yield len(batch)
            for array in arrays.values():
                array.finish()


def _worth_keeping(texts: Sequence[str], pairs: Sequence[str] | None) -> bool:
    """Return whether there are enough characters, and look no further than that."""
    return any(count >= _WORTH_KEEPING for count in itertools.accumulate(map(len, itertools.chain(texts, pairs or ()))))


def texts_fingerprint(texts: Sequence[str], pairs: Sequence[str] | None) -> str:
    """Return the sha256 of texts, or of pairs of texts, in their order."""
    sides = [texts] if pairs is None else [texts, pairs]
    digest = hashlib.sha256(f"{len(sides)} {len(texts)}".encode())
    for side in sides:
        for start in range(0, len(side), _HASHED_TOGETHER):
            # The tokenizer refuses a lone surrogate, and names the example.
            encoded = [text.encode("utf-8", "surrogatepass") for text in side[start : start + _HASHED_TOGETHER]]
            digest.update(np.asarray([len(data) for data in encoded], "<i8").tobytes())
            digest.update(b"".join(encoded))
    return digest.hexdigest()


class _GrowingArray:
    """A one-dimensional .npy file that is written piece by piece."""

    def __init__(self, directory: Path, name: str) -> None:
        # Unbuffered, so that closing it after a failed write does not write, and fail, again.
        self._file = (directory / f"{name}.npy").open("wb", buffering=0)
        self._dtype, self.length = ARRAYS[name], 0
        self._write_header()

    def __enter__(self) -> "_GrowingArray":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def append(self, values: np.ndarray) -> None:
        rest = memoryview(values.astype(self._dtype).tobytes())
        while rest:
            rest = rest[self._file.write(rest) :]
        self.length += len(values)

    def finish(self) -> None:
        self._file.seek(0)
        self._write_header()
        os.fsync(self._file.fileno())

    def _write_header(self) -> None:
        # numpy leaves room in the header for any length of the first axis, so it can be overwritten.
        shape = {"descr": self._dtype.str, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self._file, shape)


def _read(entry: Path) -> Tokens:
    """Return the tokens in an entry's directory as memory maps."""
    maps = {name: np.load(entry / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ARRAYS}
    pages = MappedPages([maps["input_ids"], maps["token_type_ids"]])
    return Tokens(**{name: array.view(np.ndarray) for name, array in maps.items()}, pages=pages)
