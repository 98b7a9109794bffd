"""Tensors of a Hugging Face directory: strict reading into a model's state, and writing it back.

Every tensor of the file matches exactly one rule of the family's table, every leaf of the model is filled, and only
declared heads may be new. Only safetensors is read, so nothing in a file is ever run. A tensor is read when its turn
comes, the part of each device by itself and in pieces: beyond the parameters and the files' mapping, memory holds
about one tensor, or one device's part of it.
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
from xtransfer.errors import UserError
from xtransfer.models.hf.weight_map import TRANSPOSE, Family
from xtransfer.runtime.sharding import path_name

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
NO_WEIGHTS = (
    f"no {WEIGHTS} (pickled weights such as pytorch_model.bin are never read: convert them with safetensors, or ask "
    "for a revision of the checkpoint that has them)"
)
DTYPES = ("F32", "F16", "BF16")  # the half precisions are widened
STORED = {"float32": np.float32, "float16": np.float16, "bfloat16": jnp.bfloat16}
_PIECE = 1 << 18  # numbers read at a time: what they take beside the tensor is little, and stays in the cache

Index = tuple[slice, ...]  # a part of an array: a slice of each axis, with start and stop

log = logging.getLogger(__name__)


def leaves(state: nnx.State) -> dict[str, Any]:
    """The variables of a state by dotted path."""
    return {dotted(path): variable for path, variable in nnx.to_flat_state(state)}


def dotted(path: Sequence[Any]) -> str:
    """A leaf's path as one name."""
    return ".".join(map(str, path))


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies: name and shape as in the file; `only_with`: a leaf without which it does not matter."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    transform: str
    only_with: str | None = None

    def check(self, shape: tuple[int, ...]) -> None:
        """UserError where this cannot be a leaf of `shape`; nothing but the file's header is needed."""
        expected = shape[::-1] if self.transform == TRANSPOSE else shape
        if self.shape != expected:
            raise UserError(
                f"{self.file}: tensor {self.name} has shape {list(self.shape)}, the model of its config.json needs "
                f"{list(expected)}"
            )
        if self.dtype not in DTYPES:
            raise UserError(f"{self.file}: tensor {self.name} has dtype {self.dtype}: one of {', '.join(DTYPES)}")

    def read(self, files: "Files", index: Index) -> np.ndarray:
        """A part of the leaf as float32. UserError: NaN or Inf in it, or a file that cannot be read."""
        turned = self.transform == TRANSPOSE
        part = np.empty([axis.stop - axis.start for axis in index], np.float32)
        as_in_file = part.T if turned else part
        for rows, piece in self.pieces(files, index[::-1] if turned else index):
            if not np.isfinite(piece).all():
                raise UserError(f"{self.file}: tensor {self.name} has NaN or Inf: the checkpoint is broken")
            as_in_file[rows] = piece
        return part

    def pieces(self, files: "Files", index: Index) -> Iterator[tuple[slice, np.ndarray]]:
        """Runs of rows of a part of the tensor as it lies in the file: (which of the part's rows, float32)."""
        first, *others = index
        step = max(1, _PIECE // max(1, int(np.prod([axis.stop - axis.start for axis in others]))))
        try:
            tensor = files[self.file].get_slice(self.name)
            for start in range(first.start, first.stop, step):
                stop = min(start + step, first.stop)
                piece = tensor[(slice(start, stop), *others)].astype(np.float32, copy=False)
                yield slice(start - first.start, stop - first.start), piece
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{self.file}: tensor {self.name} cannot be read ({error}): fetch it again") from error

    def equals(self, other: "Tensor", files: "Files") -> bool:
        """Whether both have the same numbers; their shapes are the same."""
        pairs = zip(self.pieces(files, whole(self.shape)), other.pieces(files, whole(self.shape)), strict=True)
        return all(np.array_equal(one, another) for (_, one), (_, another) in pairs)


Files = Mapping[Path, Any]  # the open files of a checkpoint


def whole(shape: Sequence[int]) -> Index:
    """The part of an array that is all of it."""
    return tuple(slice(0, size) for size in shape)


@dataclass(frozen=True)
class WeightSource:
    """The tensors of a checkpoint by the leaf that they fill, and those that repeat another tensor."""

    directory: Path
    family: Family
    targets: dict[str, Tensor]
    copies: dict[str, Tensor]

    @classmethod
    def open(cls, directory: str | Path, family: Family) -> "WeightSource":
        """Reads the names only. UserError: no safetensors, a broken file, a tensor without a rule, two for one leaf."""
        targets: dict[str, Tensor] = {}
        copies: dict[str, Tensor] = {}
        for file in weight_files(directory):
            for name, dtype, shape in _tensors(file):
                source = family.canonical(name)
                if family.is_ignorable(source):
                    continue
                copy = family.copy_of(source)
                found = family.target(copy[0] if copy else source)
                if found is None:
                    raise UserError(
                        f"{file}: unknown tensor {name} {list(shape)}: not a plain {family.name} checkpoint"
                    )
                table = copies if copy else targets
                if found[0] in table:
                    raise UserError(f"{file}: tensors {table[found[0]].name} and {name} are the same parameter")
                table[found[0]] = Tensor(file, name, dtype, shape, found[1], copy[1] if copy else None)
        return cls(Path(directory), family, targets, copies)

    def fill(
        self,
        abstract: nnx.State,
        *,
        seed: int,
        shardings: Any = None,
        order: Mapping[str, Sequence[int]] = MappingProxyType({}),
    ) -> nnx.State:
        """`abstract` with float32 numbers from the files; declared heads that they lack are drawn from `seed`.

        `shardings`, a tree like `abstract`, says where each leaf lies: of a tensor only the parts of this process's
        devices are read. Without it, leaves lie on the default device. `order` gives, for leaves named by their path,
        the places in the file of what stands on their last axis.

        UserError: a missing or surplus tensor, a wrong shape (both are named), another dtype, NaN or Inf.
        """
        shapes = {path: variable.shape for path, variable in leaves(abstract).items()}
        missing = shapes.keys() - self.targets.keys()
        self._check(shapes, missing)
        if missing:
            log.info("%s: new, drawn from seed %d: %s", self.directory, seed, ", ".join(sorted(missing)))

        def filled(path: tuple[Any, ...], leaf: Any, sharding: Sharding | None = None) -> jax.Array:
            name = path_name(path)
            if name in missing:
                drawn = _drawn(name, leaf.shape, seed)
                return _placed(drawn.__getitem__, leaf.shape, sharding)
            tensor = self.targets[name]
            if name in order:
                ordered = tensor.read(files, whole(leaf.shape))[..., np.asarray(order[name])]
                return _placed(ordered.__getitem__, leaf.shape, sharding)
            return _placed(lambda index: tensor.read(files, index), leaf.shape, sharding)

        with self._open_files() as files:
            for path, copy in self._copies_in(shapes):
                if not copy.equals(self.targets[path], files):
                    raise UserError(
                        f"{copy.file}: tensor {copy.name} differs from the one it is tied to: not supported"
                    )
            trees = (abstract,) if shardings is None else (abstract, shardings)
            return jax.tree_util.tree_map_with_path(filled, *trees)

    @contextmanager
    def _open_files(self) -> Iterator[Files]:
        with ExitStack() as stack:
            names = {tensor.file for tensor in (*self.targets.values(), *self.copies.values())}
            yield {file: stack.enter_context(_opened(file)) for file in sorted(names)}

    def _check(self, shapes: Mapping[str, tuple[int, ...]], missing: set[str]) -> None:
        """All that the files' headers tell: nothing is read from a checkpoint that does not fit."""
        self._check_missing(missing)
        for path, tensor in self.targets.items():
            if path in shapes:
                tensor.check(shapes[path])
            elif not self.family.is_head(path):
                raise UserError(
                    f"{tensor.file}: tensor {tensor.name} has no place in the model that its config.json describes"
                )
        for path, tensor in self._copies_in(shapes):
            tensor.check(shapes[path])

    def _copies_in(self, shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[str, Tensor]]:
        """The tied copies, by the leaf that they repeat, that the model would use."""
        return [(path, copy) for path, copy in self.copies.items() if path in shapes and copy.only_with in shapes]

    def _check_missing(self, missing: set[str]) -> None:
        """Declared heads may be missing whole; anything else is an error that names the tensor as the file would."""
        there = self.targets.keys() | self.copies.keys()
        allowed: set[str] = set()
        for new in self.family.new:
            complete = not any(re.fullmatch(new.target, path) for path in there)
            if complete and new.only_with:
                complete = not any(re.fullmatch(new.only_with, path) for path in there)
            if complete:
                allowed |= {path for path in missing if re.fullmatch(new.target, path)}
        if wrong := sorted(missing - allowed):
            names = [self.family.source(path)[0] for path in wrong]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"{self.directory}: the weights lack tensor {', '.join(names[:3])}{more}")


def _placed(read: Callable[[Index], np.ndarray], shape: tuple[int, ...], sharding: Sharding | None) -> jax.Array:
    """A leaf from its parts, each read once, sent to its devices and let go before the next."""
    if sharding is None:
        return jax.device_put(read(whole(shape))).block_until_ready()
    devices: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        parts = index if index is not None else whole(shape)
        spans = tuple(part.indices(size)[:2] for part, size in zip(parts, shape, strict=True))
        devices.setdefault(spans, []).append(device)
    arrays: list[jax.Array] = []
    for spans, holders in devices.items():
        part = read(tuple(slice(*span) for span in spans))
        arrays += jax.block_until_ready([jax.device_put(part, device) for device in holders])
        del part
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _drawn(path: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """A new leaf as BERT initialises it; depends on its path, its shape and the seed only."""
    if path.endswith("kernel"):
        rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
        return (0.02 * rng.standard_normal(shape)).astype(np.float32)
    return np.full(shape, 1.0 if path.endswith("scale") else 0.0, np.float32)


def weight_files(directory: str | Path) -> list[Path]:
    """The files that hold a checkpoint's weights: model.safetensors or, without one, the shards of the index.

    UserError: neither is there, or an index that does not say the truth about its shards.
    """
    directory = Path(directory)
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    index = directory / INDEX
    if not index.is_file():
        raise UserError(f"{directory}: {NO_WEIGHTS}")
    table = read_index(index)
    files = [directory / name for name in sorted(set(table.values()))]
    if absent := [file.name for file in files if not file.is_file()]:
        raise UserError(f"{index}: {', '.join(absent)} missing")
    found = [(name, file.name) for file in files for name, _, _ in _tensors(file)]
    if twice := [name for name, count in Counter(name for name, _ in found).items() if count > 1]:
        raise UserError(f"{index}: tensor {min(twice)} is in several of the files")
    if different := set(found) ^ set(table.items()):
        raise UserError(f"{index}: tensor {min(different)[0]} is not in the file that the index says, or not in both")
    return files


def read_index(index: Path) -> dict[str, str]:
    """Tensor -> file name from `model.safetensors.index.json`. UserError: anything but files of its own directory."""
    table = storage.read_object(index, "fetch it again").get("weight_map")
    names = list(table.values()) if isinstance(table, dict) else []
    if not names or not all(isinstance(n, str) and re.fullmatch(r"\w[\w.-]*\.safetensors", n) for n in names):
        raise UserError(f"{index}: weight_map has to map tensors to .safetensors files of this directory")
    return dict(table or {})


def _tensors(file: Path) -> list[tuple[str, str, tuple[int, ...]]]:
    with _opened(file) as handle:
        slices = [(name, handle.get_slice(name)) for name in handle.keys()]  # noqa: SIM118
        return [(name, part.get_dtype(), tuple(part.get_shape())) for name, part in slices]


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, "np")
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file}: not a whole safetensors file ({error}): fetch it again") from error


def write_weights(file: Path, params: nnx.State, family: Family, dtype: str = "float32") -> None:
    """Write a state under the family's names in `dtype`, one of STORED. In float32 it is the inverse of `fill`.

    UserError: a number that `dtype` cannot hold, or NaN or Inf.
    """
    tensors: dict[str, np.ndarray] = {}
    for path, variable in leaves(params).items():
        name, transform = family.source(path)
        array = np.asarray(variable[...]).astype(STORED[dtype])
        if not np.isfinite(array).all():
            raise UserError(f"{file}: tensor {name} has NaN or Inf, or numbers beyond {dtype}: not saved")
        tensors[name] = np.ascontiguousarray(array.T) if transform == TRANSPOSE else array
    save_file(tensors, file, metadata={"format": "pt"})  # transformers refuses a file without this mark
