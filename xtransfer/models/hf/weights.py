"""Strict reading of a Hugging Face directory's tensors into a model's state, and writing them back.

Every tensor of the file matches exactly one rule of the family's table, every leaf of the model is filled, and only
declared heads may be new. Safetensors are read, and PyTorch files through `pytorch_file`, so nothing in a file is ever
executed. A tensor is read when its turn comes, one device's shard at a time and in pieces. So beyond the parameters and
the mapped files, memory holds about one tensor, or one device's shard of it.
"""

import logging
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from xtransfer import storage
from xtransfer.errors import CheckpointError
from xtransfer.models.hf.pytorch_file import PytorchFile
from xtransfer.models.hf.weight_map import Family, Layout
from xtransfer.runtime.sharding import path_name

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SAFETENSORS = (WEIGHTS, INDEX)
PYTORCH = ("pytorch_model.bin", "pytorch_model.bin.index.json")
NO_WEIGHTS = (
    f"no {WEIGHTS} and no {PYTORCH[0]}, in one file or with an index: choose a revision of the checkpoint that has one"
)
DTYPES = ("F32", "F16", "BF16")  # half precision is widened to float32
STORED = {"float32": np.float32, "float16": np.float16, "bfloat16": jnp.bfloat16}
_PIECE = 1 << 18  # numbers to read at a time: small beside a tensor, and they stay in the processor's cache

Index = tuple[slice, ...]  # a region of an array: a slice of each axis, with start and stop

log = logging.getLogger(__name__)


def leaves(state: nnx.State) -> dict[str, Any]:
    """Return the variables of a state by dotted path."""
    return {dotted(path): variable for path, variable in nnx.to_flat_state(state)}


def dotted(path: Sequence[Any]) -> str:
    """Return a leaf's path as one name."""
    return ".".join(map(str, path))


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file.

    Attributes:
      file: the safetensors or PyTorch file.
      name: as in the file.
      dtype: as safetensors names it.
      shape: as in the file.
      layout: how the leaf lies in it.
      only_with: the leaf without which this tensor does not matter; None if it always does.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    layout: Layout
    only_with: str | None = None

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuse this tensor for a leaf of `shape`; only the file's header is needed."""
        rows, *others = shape[::-1] if self.layout.transposed else shape
        expected = (rows * self.layout.parts, *others)
        if self.shape != expected:
            raise CheckpointError(
                f"{self.file}: tensor {self.name} has shape {list(self.shape)}, the model of its config.json needs "
                f"{list(expected)}"
            )
        if self.dtype not in DTYPES:
            raise CheckpointError(
                f"{self.file}: tensor {self.name} has dtype {self.dtype}, expected one of {', '.join(DTYPES)}: "
                "convert it"
            )

    def read(self, files: "Files", index: Index) -> np.ndarray:
        """Return a region of the leaf as float32.

        Raises:
          UserError: it holds NaN or Inf, or the file cannot be read.
        """
        region = np.empty([axis.stop - axis.start for axis in index], np.float32)
        as_in_file = region.T if self.layout.transposed else region
        for rows, piece in self._finite_pieces(files, index):
            as_in_file[rows] = piece
        return region

    def check_numbers(self, files: "Files", index: Index) -> None:
        """Raise the errors of `read`, in a quarter of its time, because nothing is copied."""
        for _ in self._finite_pieces(files, index):
            pass

    def _finite_pieces(self, files: "Files", index: Index) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield `pieces` of a region of the leaf."""
        first, *others = index[::-1] if self.layout.transposed else index
        start = self.shape[0] // self.layout.parts * self.layout.part
        for rows, piece in self.pieces(files, (slice(start + first.start, start + first.stop), *others)):
            if not np.isfinite(piece).all():
                raise CheckpointError(f"{self.file}: tensor {self.name} has NaN or Inf: the checkpoint is broken")
            yield rows, piece

    def pieces(self, files: "Files", index: Index) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield a region of the tensor in runs of rows, as the file has them: (which rows of the region, float32)."""
        first, *others = index
        step = max(1, _PIECE // max(1, int(np.prod([axis.stop - axis.start for axis in others]))))
        try:
            tensor = files[self.file].get_slice(self.name)
            for start in range(first.start, first.stop, step):
                stop = min(start + step, first.stop)
                piece = tensor[(slice(start, stop), *others)].astype(np.float32, copy=False)
                yield slice(start - first.start, stop - first.start), piece
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.file}: tensor {self.name} cannot be read ({error}): download it again"
            ) from error

    def equals(self, other: "Tensor", files: "Files") -> bool:
        """Return whether both tensors, of the same shape, hold the same numbers."""
        pairs = zip(self.pieces(files, whole(self.shape)), other.pieces(files, whole(self.shape)), strict=True)
        return all(np.array_equal(piece, other_piece) for (_, piece), (_, other_piece) in pairs)


Files = Mapping[Path, Any]  # a checkpoint's open files


def whole(shape: Sequence[int]) -> Index:
    """Return the index of a whole array."""
    return tuple(slice(0, size) for size in shape)


@dataclass(frozen=True)
class WeightSource:
    """A checkpoint's tensors by the leaf that they fill, and its copies, which repeat another tensor."""

    directory: Path
    family: Family
    targets: dict[str, Tensor]
    copies: dict[str, Tensor]

    @classmethod
    def open(cls, directory: str | Path, family: Family) -> "WeightSource":
        """Open a checkpoint and read its names.

        Raises:
          UserError: no weights, a broken file, a tensor without a rule, or two tensors for one leaf.
        """
        targets: dict[str, Tensor] = {}
        copies: dict[str, Tensor] = {}
        for file in weight_files(directory):
            for name, dtype, shape in _tensors(file):
                source = family.canonical(name)
                if family.is_ignorable(source):
                    continue
                copy = family.copy_of(source)
                matches = family.targets(copy[0] if copy else source)
                if not matches:
                    raise CheckpointError(
                        f"{file}: unknown tensor {name} {list(shape)}: not a plain {family.name} checkpoint"
                    )
                table = copies if copy else targets
                for target, layout in matches:
                    if target in table:
                        raise CheckpointError(f"{file}: tensors {table[target].name} and {name} are the same parameter")
                    table[target] = Tensor(file, name, dtype, shape, layout, copy[1] if copy else None)
        return cls(Path(directory), family, targets, copies)

    def fill(
        self,
        abstract: nnx.State,
        *,
        seed: int,
        shardings: Any = None,
        order: Mapping[str, Sequence[int]] = MappingProxyType({}),
    ) -> nnx.State:
        """Return `abstract` with float32 numbers from the files.

        Args:
          abstract: the shapes of the parameters.
          seed: the seed of declared heads that the files lack.
          shardings: a tree like `abstract`, the layout of each leaf; only the shards of this process's devices are
            read. None puts every leaf on the default device.
          order: for some leaves, by path: the indices in the file of the entries of their last axis.

        Raises:
          UserError: a missing or unexpected tensor, a wrong shape (both are named), another dtype, NaN, or Inf.
        """
        shapes = {path: variable.shape for path, variable in leaves(abstract).items()}
        missing = shapes.keys() - self.targets.keys()
        self._check(shapes, missing)
        if missing:
            log.info("%s: new, drawn from seed %d: %s", self.directory, seed, ", ".join(sorted(missing)))

        def fill_leaf(path: tuple[Any, ...], leaf: Any, sharding: Sharding | None = None) -> jax.Array:
            name = path_name(path)
            if name in missing:
                drawn = _draw(name, leaf.shape, seed)
                return _placed(drawn.__getitem__, leaf.shape, sharding)
            tensor = self.targets[name]
            if name in order:
                ordered = tensor.read(files, whole(leaf.shape))[..., np.asarray(order[name])]
                return _placed(ordered.__getitem__, leaf.shape, sharding)
            return _placed(lambda index: tensor.read(files, index), leaf.shape, sharding)

        with self._open_files() as files:
            self._check_copies(shapes, files)
            trees = (abstract,) if shardings is None else (abstract, shardings)
            return jax.tree_util.tree_map_with_path(fill_leaf, *trees)

    def check(self, abstract: nnx.State, *, shardings: Any = None) -> None:
        """Raise the errors that `fill` would raise; see there for the arguments.

        The same tensors are read, and nothing is kept.
        """
        shapes = {path: variable.shape for path, variable in leaves(abstract).items()}
        self._check(shapes, shapes.keys() - self.targets.keys())

        def check_leaf(path: tuple[Any, ...], leaf: Any, sharding: Sharding | None = None) -> None:
            tensor = self.targets.get(path_name(path))
            if tensor is not None:
                for index, _ in _shards(leaf.shape, sharding):
                    tensor.check_numbers(files, index)

        with self._open_files() as files:
            self._check_copies(shapes, files)
            trees = (abstract,) if shardings is None else (abstract, shardings)
            jax.tree_util.tree_map_with_path(check_leaf, *trees)

    def _check_copies(self, shapes: Mapping[str, tuple[int, ...]], files: Files) -> None:
        for path, copy in self._copies_in(shapes):
            if not copy.equals(self.targets[path], files):
                raise CheckpointError(
                    f"{copy.file}: tensor {copy.name} differs from the one it is tied to: not supported"
                )

    @contextmanager
    def _open_files(self) -> Iterator[Files]:
        with ExitStack() as stack:
            files = {tensor.file for tensor in (*self.targets.values(), *self.copies.values())}
            yield {file: stack.enter_context(_open(file)) for file in sorted(files)}

    def _check(self, shapes: Mapping[str, tuple[int, ...]], missing: set[str]) -> None:
        """Check everything that the files' headers say, so that nothing is read from a checkpoint that does not fit."""
        self._check_missing(missing)
        for path, tensor in self.targets.items():
            if path in shapes:
                tensor.check(shapes[path])
            elif not self.family.may_be_unused(path):
                raise CheckpointError(
                    f"{tensor.file}: tensor {tensor.name} has no place in the model that its config.json describes"
                )
        for path, tensor in self._copies_in(shapes):
            tensor.check(shapes[path])

    def _copies_in(self, shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[str, Tensor]]:
        """Return the tied copies that the model would use, by the leaf that they repeat."""
        return [(path, copy) for path, copy in self.copies.items() if path in shapes and copy.only_with in shapes]

    def _check_missing(self, missing: set[str]) -> None:
        """Refuse missing tensors, named as in the file; a declared head may be missing completely."""
        present = self.targets.keys() | self.copies.keys()
        allowed: set[str] = set()
        for new in self.family.new:
            all_absent = not any(re.fullmatch(new.target, path) for path in present)
            if all_absent and new.only_with:
                all_absent = not any(re.fullmatch(new.only_with, path) for path in present)
            if all_absent:
                allowed |= {path for path in missing if re.fullmatch(new.target, path)}
        not_allowed = sorted(missing - allowed)
        if not_allowed:
            names = list(dict.fromkeys(self.family.source(path)[0] for path in not_allowed))
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise CheckpointError(f"{self.directory}: the weights lack tensor {', '.join(names[:3])}{more}")


def _placed(read: Callable[[Index], np.ndarray], shape: tuple[int, ...], sharding: Sharding | None) -> jax.Array:
    """Return a leaf, reading each shard once and releasing it before the next."""
    if sharding is None:
        return jax.device_put(read(whole(shape))).block_until_ready()
    arrays: list[jax.Array] = []
    for index, holders in _shards(shape, sharding):
        shard = read(index)
        arrays += jax.block_until_ready([jax.device_put(shard, device) for device in holders])
        del shard
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _shards(shape: tuple[int, ...], sharding: Sharding | None) -> list[tuple[Index, list[jax.Device]]]:
    """Return this process's different shards, each with its devices; without a sharding, the whole leaf."""
    if sharding is None:
        return [(whole(shape), [])]
    devices: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        axes = index if index is not None else whole(shape)
        spans = tuple(axis.indices(size)[:2] for axis, size in zip(axes, shape, strict=True))
        devices.setdefault(spans, []).append(device)
    return [(tuple(slice(*span) for span in spans), holders) for spans, holders in devices.items()]


def _draw(path: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Return a new leaf as BERT initializes it, from its path, its shape, and the seed only."""
    if path.endswith("kernel"):
        rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
        return (0.02 * rng.standard_normal(shape)).astype(np.float32)
    return np.full(shape, 1.0 if path.endswith("scale") else 0.0, np.float32)


def find_weights(directory: str | Path) -> Path:
    """Return a checkpoint's single file of weights or else its index; safetensors come before PyTorch files.

    Raises:
      UserError: there is none.
    """
    for name in (*SAFETENSORS, *PYTORCH):
        if (Path(directory) / name).is_file():
            return Path(directory) / name
    raise CheckpointError(f"{directory}: {NO_WEIGHTS}")


def weight_files(directory: str | Path) -> list[Path]:
    """Return the files that hold a checkpoint's weights: the one of `find_weights`, or the shards of its index.

    Raises:
      UserError: there are no weights, or the index does not match its shards.
    """
    index = find_weights(directory)
    if index.suffix != ".json":
        return [index]
    table = read_index(index)
    files = [index.parent / name for name in sorted(set(table.values()))]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise CheckpointError(f"{index}: {', '.join(absent)} missing")
    file_of_tensor = [(name, file.name) for file in files for name, _, _ in _tensors(file)]
    repeated = [name for name, count in Counter(name for name, _ in file_of_tensor).items() if count > 1]
    if repeated:
        raise CheckpointError(f"{index}: tensor {min(repeated)} is in several of the files")
    different = set(file_of_tensor) ^ set(table.items())
    if different:
        raise CheckpointError(
            f"{index}: tensor {min(different)[0]} is not in the file that the index names, or not in both"
        )
    return files


def read_index(index: Path) -> dict[str, str]:
    """Return the file name of each tensor in an index; UserError unless the files are in its directory."""
    table = storage.read_object(index, "download it again").get("weight_map")
    names = list(table.values()) if isinstance(table, dict) else []
    suffix = ".safetensors" if index.name == INDEX else ".bin"
    if not names or not all(isinstance(n, str) and re.fullmatch(rf"\w[\w.-]*\{suffix}", n) for n in names):
        raise CheckpointError(f"{index}: weight_map must map tensors to {suffix} files of this directory")
    return dict(table or {})


def _tensors(file: Path) -> list[tuple[str, str, tuple[int, ...]]]:
    with _open(file) as handle:
        slices = [(name, handle.get_slice(name)) for name in handle.keys()]  # noqa: SIM118
        return [(name, tensor.get_dtype(), tuple(tensor.get_shape())) for name, tensor in slices]


def _open(file: Path) -> Any:
    storage.refuse_lfs_pointer(file)
    if file.suffix == ".bin":
        return PytorchFile(file)
    try:
        return safe_open(file, "np")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not a complete safetensors file ({error}): download it again") from error


def write_weights(file: Path, params: nnx.State, family: Family, dtype: str = "float32") -> None:
    """Write a state under the family's names in `dtype`, one of STORED. In float32 it is the inverse of `fill`.

    Raises:
      UserError: a number that `dtype` cannot hold, NaN, or Inf.
    """
    parts: dict[str, dict[int, np.ndarray]] = {}
    for path, variable in leaves(params).items():
        name, layout = family.source(path)
        array = np.asarray(variable[...]).astype(STORED[dtype])
        if not np.isfinite(array).all():
            raise CheckpointError(f"{file}: tensor {name} has NaN or Inf, or numbers beyond {dtype}: not saved")
        parts.setdefault(name, {})[layout.part] = np.ascontiguousarray(array.T) if layout.transposed else array
    tensors = {
        name: np.concatenate([arrays[part] for part in sorted(arrays)]) if len(arrays) > 1 else arrays[0]
        for name, arrays in parts.items()
    }
    save_file(tensors, file, metadata={"format": "pt"})  # transformers refuses a file without this metadata
