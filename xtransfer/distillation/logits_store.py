"""The teacher's logits on disk: one float32 row per example id, raw, in shards.

    <root>/<key>/manifest.json      describes the rows; never changed once written, but repaired if damaged
                 ids.txt            the example ids in row order, one per line
                 shard-00000.npy    rows 0 .. shard_size − 1, and so on
                 disagreement.npy   for the mean of several teachers: how much they disagree on each row, in nats
                 checksums.json     the size and sha256 of the manifest, each shard, and the disagreement

Raw logits suit any temperature, threshold, or loss without another run of the teacher. The key hashes everything that
decides them, so a store of another teacher or of other data is never used. A shard exists completely or not at all, and
a damaged one counts as missing.
Only process 0 writes, and the workdir's lock keeps other runs out.
"""

import dataclasses
import hashlib
import io
import itertools
import json
import logging
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xtransfer import storage
from xtransfer.data.repeats import first_repeated
from xtransfer.errors import CheckpointError, ConfigError, DataError
from xtransfer.runtime import checksums, processes

_log = logging.getLogger(__name__)

FORMAT = 1
DISAGREEMENT = "disagreement.npy"
# An interruption loses at most one shard. Each one rewrites the list of checksums, so there must not be many thousand.
_SHARD_SIZE, _LARGE_SHARD_SIZE = 1 << 10, 1 << 16
_MANY = 1 << 20  # examples, above which shards are large
_RERUN = "run the same command to label the missing shards"


def store_key(*, teacher_fingerprint: str, tokenizer_fingerprint: str, max_length: int, data_fingerprint: str) -> str:
    """Return the store's directory name: 16 hex digits that differ if any of the four arguments differs."""
    fields = {
        "teacher_fingerprint": teacher_fingerprint,
        "tokenizer_fingerprint": tokenizer_fingerprint,
        "max_length": max_length,
        "data_fingerprint": data_fingerprint,
    }
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class LogitsStore:
    """An open store, from `open_store`. It holds no logits; shards are read on request."""

    directory: Path
    classes: tuple[str, ...]
    ids: Sequence[str]
    shard_size: int

    @property
    def num_shards(self) -> int:
        """The number of shards in the complete store."""
        return -(-len(self.ids) // self.shard_size)

    def shard_indices(self, shard: int) -> np.ndarray:
        """Return the rows that a shard holds, as positions in `ids`: np.int64 [n_i]."""
        if not 0 <= shard < self.num_shards:
            raise IndexError(f"shard {shard} of {self.num_shards}")
        return np.arange(shard * self.shard_size, min((shard + 1) * self.shard_size, len(self.ids)))

    def missing_shards(self) -> list[int]:
        """Return the shards that are absent or damaged, in ascending order."""
        listed = checksums.listed(self.directory)  # once for all shards
        return [shard for shard in range(self.num_shards) if self.fault(shard, listed) is not None]

    def fault(self, shard: int, listed: Mapping[str, Mapping[str, Any]] | None = None) -> str | None:
        """Return in words what is wrong with a shard; None if it is complete and as it was written.

        Args:
          shard: the shard's number.
          listed: see `checksums.fault_of`.
        """
        if self._is_complete(shard):
            return checksums.fault_of(self._path(shard), listed)
        name = self._path(shard).name
        return f"{name} is {'truncated or of another size' if self.exists(shard) else 'missing'}"

    def exists(self, shard: int) -> bool:
        """Return whether a shard has a file, whole or damaged."""
        return self._path(shard).exists()

    @property
    def complete(self) -> bool:
        """Whether every shard exists and is complete."""
        return not self.missing_shards()

    def write_shard(self, shard: int, logits: np.ndarray) -> None:
        """Write a shard, completely or not at all; it is on the disk when this returns.

        Args:
          shard: from `missing_shards`.
          logits: np.float32 [n_i, K], rows as in `shard_indices`, columns as in `classes`.

        Raises:
          UserError: another shape or dtype, a value that is not finite, or a failing disk.
        """
        indices = self.shard_indices(shard)
        expected = (len(indices), len(self.classes))
        if logits.shape != expected or logits.dtype != np.float32:
            raise CheckpointError(
                f"{self._path(shard)}: the teacher gave logits of shape {logits.shape} {logits.dtype}, "
                f"expected {expected} float32 for classes {list(self.classes)}"
            )
        bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
        if len(bad):
            raise CheckpointError(
                f"the teacher's logits of {len(bad)} examples are NaN or infinite, "
                f"first {self.ids[indices[bad[0]]]!r}: its training or its checkpoint is broken"
            )
        checksums.write(self._path(shard), _npy(logits))

    def read(self, ids: Sequence[str]) -> np.ndarray:
        """Return the logits of these examples, in this order: np.float32 [n, K].

        Raises:
          UserError: the store is incomplete, or has no such id.
        """
        missing = self.missing_shards()
        if missing:
            raise CheckpointError(
                f"{self.directory}: {self.fault(missing[0])} ({len(missing)} of {self.num_shards} shards): {_RERUN}"
            )
        logits = np.empty((len(self.ids), len(self.classes)), np.float32)
        for shard in range(self.num_shards):
            logits[self.shard_indices(shard)] = np.load(self._path(shard), allow_pickle=False)
        if ids is self.ids or (len(ids) == len(self.ids) and all(map(operator.eq, ids, self.ids))):
            return logits
        requested = set(ids)  # usually few
        row_by_id = {id_: row for row, id_ in enumerate(self.ids) if id_ in requested}
        unknown = [id_ for id_ in ids if id_ not in row_by_id]
        if unknown:
            raise CheckpointError(
                f"{self.directory}: no logits of example {unknown[0]!r} ({len(unknown)} ids are missing)"
            )
        return logits[[row_by_id[id_] for id_ in ids]].reshape(len(ids), len(self.classes))

    def write_disagreement(self, values: np.ndarray) -> None:
        """Keep the disagreement of several teachers on each example, np.float32 [n], rows as in `ids`."""
        checksums.write(self.directory / DISAGREEMENT, _npy(values.astype(np.float32)))

    def disagreement(self) -> np.ndarray | None:
        """Return the disagreement on each example, np.float32 [n]; None if there is none, or it is damaged."""
        path = self.directory / DISAGREEMENT
        if not path.exists() or checksums.fault_of(path) is not None:
            return None
        return np.load(path, allow_pickle=False)

    def _path(self, shard: int) -> Path:
        return self.directory / f"shard-{shard:05d}.npy"

    def _is_complete(self, shard: int) -> bool:
        rows = len(self.shard_indices(shard))
        expected = _npy(np.zeros((rows, len(self.classes)), np.float32))
        header = expected[: -rows * len(self.classes) * 4]
        try:
            with self._path(shard).open("rb") as file:
                return os.fstat(file.fileno()).st_size == len(expected) and file.read(len(header)) == header
        except FileNotFoundError:
            return False


def open_store(
    root: Path,
    key_fields: Mapping[str, Any],
    *,
    classes: Sequence[str],
    ids: Sequence[str],
    shard_size: int | None = None,
) -> LogitsStore:
    """Open the store of these key fields under `root`, or create an empty one.

    Args:
      root: the directory of all stores, `workdir/logits`.
      key_fields: the arguments of `store_key`.
      classes: names of the logits' columns, in order.
      ids: example ids in row order, each once. They may be on disk, and must not change.
      shard_size: examples per shard; None takes that of an existing store, or else `default_shard_size`.

    Raises:
      UserError: ids or classes that cannot be stored, a manifest with other contents, or a failing disk.
    """
    classes, ids = tuple(classes), tuple(ids) if isinstance(ids, list) else ids
    directory = Path(root) / store_key(**key_fields)
    if shard_size is None:
        shard_size = _stored_shard_size(directory) or default_shard_size(len(ids))
    _check(classes, ids, shard_size)
    digest = hashlib.sha256()
    for lines in _id_lines(ids):
        digest.update(lines)
    manifest = {
        "format": FORMAT,
        "classes": list(classes),
        "count": len(ids),
        "shard_size": shard_size,
        "ids_sha256": digest.hexdigest(),
        "key": dict(key_fields),
    }
    path = directory / "manifest.json"
    content = (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode()

    def create() -> None:
        # A damaged manifest is repaired if this one has the checksum of the one that was written.
        is_damaged = path.exists() and path.read_bytes() != content and checksums.is_listed(path, content)
        if is_damaged:
            _log.warning("%s was damaged, so written again", path)
        if is_damaged or not path.exists():
            storage.write_pieces(directory / "ids.txt", _id_lines(ids))
            # The manifest comes last: if it exists, the store is set up.
            checksums.write(path, content)

    processes.on_first(create)
    _compare(path, manifest)
    return LogitsStore(directory, classes, ids, shard_size)


def default_shard_size(n: int) -> int:
    """Return the examples per shard in a new store of n examples: few shards, and little to repeat if it is stopped."""
    return _SHARD_SIZE if n <= _MANY else _LARGE_SHARD_SIZE


def _stored_shard_size(directory: Path) -> int:
    """Return the examples per shard in an existing store; 0 if there is none, or its manifest is damaged."""
    try:
        size = storage.read_json((directory / "manifest.json").read_text(encoding="utf-8"))["shard_size"]
    except (OSError, ValueError, KeyError, TypeError):
        return 0
    return size if isinstance(size, int) and size > 0 else 0


def _id_lines(ids: Sequence[str]) -> Iterator[bytes]:
    """Yield the lines of ids.txt, some thousand at a time."""
    iterator = iter(ids)
    while group := list(itertools.islice(iterator, _LARGE_SHARD_SIZE)):
        yield "".join(f"{id_}\n" for id_ in group).encode()


def _check(classes: tuple[str, ...], ids: Sequence[str], shard_size: int) -> None:
    if not len(ids):
        raise DataError("no examples for the teacher to label")
    if shard_size < 1:
        raise ConfigError(f"shard_size = {shard_size}, expected 1 or more")
    if len(classes) < 2 or len(set(classes)) != len(classes):
        raise DataError(f"the teacher's classes {list(classes)}: expected two or more different names")
    for id_ in ids:
        if not id_ or id_.splitlines() != [id_] or not _is_unicode(id_):
            raise DataError(f"example id {id_!r}: expected one non-empty line of valid Unicode")
    repeated = first_repeated(ids)
    if repeated is not None:
        raise DataError(f"example id {repeated!r} occurs twice: ids must be unique")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return True


def _compare(path: Path, manifest: dict[str, Any]) -> None:
    """Raise a UserError with the differing entries unless the file at `path` is this manifest."""
    stored = storage.read_object(path, f"delete {path.parent} to label again")
    if stored != manifest:
        differences = "; ".join(
            f"{key}: {stored.get(key, 'nothing')!r} in the store, {manifest.get(key, 'nothing')!r} requested"
            for key in sorted(stored.keys() | manifest.keys())
            if key not in stored or key not in manifest or stored[key] != manifest[key]
        )
        raise CheckpointError(f"{path}: holds other logits ({differences}): delete {path.parent} to label again")


def _npy(array: np.ndarray) -> bytes:
    """Return the bytes of an .npy file, which depend on the array alone."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()
