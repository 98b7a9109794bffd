"""Tensors of a file that `torch.save` wrote, read without PyTorch and without running anything in the file.

The file is a zip. Its `data.pkl` is a pickle that describes the tensors, and each `data/N` holds the numbers of one
storage, uncompressed. A pickle is a program for a small stack machine. `pickle.Unpickler` with a strict `find_class`
would still run it: it calls what `find_class` returns with any arguments, calls `__setstate__` and `append`, takes
registered extensions without asking, and allocates a memo as large as the program says. So `_Machine` interprets the
few opcodes that a dictionary of tensors needs. A name in the pickle stays a name, nothing is imported or called, and
every other opcode and name is refused.

Opening a file reads its list of members and `data.pkl`, both of bounded size. Slicing a tensor reads that region only.
"""

import contextlib
import io
import math
import mmap
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from xtransfer.errors import CheckpointError, one_line

_REMEDY = "download it again, or save the model's state_dict alone, as safetensors"

_MAX_DIRECTORY = 1 << 22  # bytes of the zip's list of members: about 50,000 of them
_MAX_PICKLE = 1 << 22  # bytes of data.pkl: a model with 400 tensors has 40 kB
_MAX_OPCODES = 1_000_000  # about 35 for each tensor
_MAX_AXES = 32
_MAX_SIZE = 1 << 62

_ORDERED_DICT = "collections.OrderedDict"
_TENSOR = "torch._utils._rebuild_tensor_v2"
_PARAMETER = "torch._utils._rebuild_parameter"
# Names of storages, and of dtypes as safetensors has them.
_STORAGES = {
    "torch.DoubleStorage": "F64",
    "torch.FloatStorage": "F32",
    "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16",
    "torch.LongStorage": "I64",
    "torch.IntStorage": "I32",
    "torch.ShortStorage": "I16",
    "torch.CharStorage": "I8",
    "torch.ByteStorage": "U8",
    "torch.BoolStorage": "BOOL",
}
_NAMES = {_ORDERED_DICT, _TENSOR, _PARAMETER, *_STORAGES}
_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LOCAL_HEADER = struct.Struct("<4s2xHH16xHH")  # signature, flags, method, lengths of the name and of the extra field


@dataclass(frozen=True)
class _Name:
    """A module's attribute that the pickle names. It is never imported."""

    dotted: str


@dataclass(frozen=True)
class _Storage:
    """A storage that the pickle describes: the member `data/KEY` with `length` numbers of a dtype."""

    key: str
    dtype: str
    length: int


@dataclass(frozen=True)
class _Description:
    """A tensor that the pickle describes; offset and strides count numbers of its storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class TensorSlice:
    """One tensor of an open file, with the methods of a slice of `safetensors.safe_open`."""

    def __init__(self, data: mmap.mmap, start: int, order: str, description: _Description):
        self._data, self._start, self._order, self._description = data, start, order, description

    def get_dtype(self) -> str:
        """Return the dtype under its name in safetensors, such as F32."""
        return self._description.storage.dtype

    def get_shape(self) -> list[int]:
        """Return the shape."""
        return list(self._description.shape)

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """Return a copy of a region, in the tensor's dtype; only that region is read."""
        dtype, tensor = _DTYPES[self.get_dtype()], self._description
        # Read unsigned integers, because NumPy swaps the bytes of these and not those of bfloat16.
        stored: np.ndarray = np.ndarray(
            tensor.shape,
            f"{self._order}u{dtype.itemsize}",
            buffer=self._data,
            offset=self._start + tensor.offset * dtype.itemsize,
            strides=[stride * dtype.itemsize for stride in tensor.strides],
        )
        region: tuple[Any, ...] = (*index, ...)  # with the dots, a tensor without axes stays an array
        return stored[region].astype(f"=u{dtype.itemsize}").view(dtype)


class PytorchFile:
    """An open file of tensors, with the methods of `safetensors.safe_open`. Use it as a context manager.

    Args:
      path: the file, such as pytorch_model.bin.

    Raises:
      UserError: the file cannot be read, is not a zip of `torch.save`, or holds anything but tensors by name.
    """

    def __init__(self, path: Path):
        try:
            with path.open("rb") as file:
                if file.read(4) != b"PK\3\4":
                    raise ValueError("it is not a zip file, as PyTorch 1.6 and later write")
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            members = _members(path)
            self._order = _byte_order(self._data, members)
            start, size = _span(self._data, members, "data.pkl")
            if size > _MAX_PICKLE:
                raise ValueError(f"its data.pkl has {size} bytes, more than any model needs")
            program = self._data[start : start + size]
            # A wrong bit in a key or an offset could give a tensor the numbers of another one. Some files have no sum.
            if members["data.pkl"].CRC not in (0, zlib.crc32(program)):
                raise ValueError("its data.pkl does not have the checksum that the zip gives for it")
            self._tensors = _tensors(_Machine().run(program))
            self._starts = {
                storage.key: _storage_start(self._data, members, storage)
                for storage in {tensor.storage for tensor in self._tensors.values()}
            }
        except (ValueError, OSError, OverflowError, NotImplementedError, zipfile.BadZipFile, struct.error) as error:
            reason = getattr(error, "strerror", None) or one_line(error)  # without the path of an OSError
            raise CheckpointError(f"{path}: {reason}: {_REMEDY}") from error

    def __enter__(self) -> "PytorchFile":
        return self

    def __exit__(self, *exception: object) -> None:
        # An array that a traceback holds keeps the map open; it is closed with that array.
        with contextlib.suppress(BufferError):
            self._data.close()

    def keys(self) -> list[str]:
        """Return the names of the tensors, in the file's order."""
        return list(self._tensors)

    def get_slice(self, name: str) -> TensorSlice:
        """Return a tensor, of which nothing is read yet; a ValueError if there is none of this name."""
        if name not in self._tensors:
            raise ValueError(f"no tensor {name}")
        tensor = self._tensors[name]
        return TensorSlice(self._data, self._starts[tensor.storage.key], self._order, tensor)


class _BoundedFile(io.FileIO):
    """A file for `zipfile`, which would read a list of members of any size at once."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _MAX_DIRECTORY:
            raise ValueError(f"its list of members has {size} bytes, more than any model needs")
        return super().read(size)


def _members(path: Path) -> dict[str, zipfile.ZipInfo]:
    """Return the members of a zip by their names below its one folder; a ValueError for any other zip."""
    with _BoundedFile(path) as file, zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
    root = infos[0].filename.partition("/")[0] if infos else ""
    members: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        # zipfile cuts a name at a zero byte, so check the name as it is stored.
        folder, _, name = info.orig_filename.partition("/")
        if folder != root or not name or {"", ".", ".."} & {root, *name.split("/")} or "\\" in name or "\0" in name:
            raise ValueError(f"its member {_quoted(info.orig_filename)} is not in its folder {_quoted(root)}")
        if name in members:
            raise ValueError(f"its member {_quoted(info.filename)} occurs twice")
        members[name] = info
    if "constants.pkl" in members:
        raise ValueError("it is a TorchScript program, not tensors")
    return members


def _span(data: mmap.mmap, members: dict[str, zipfile.ZipInfo], name: str) -> tuple[int, int]:
    """Return where a member's bytes start, and their number; a ValueError unless they are stored inside the file."""
    if name not in members:
        raise ValueError(f"its member {name} is missing")
    info = members[name]
    start, size = info.header_offset, info.file_size
    if start < 0 or start + _LOCAL_HEADER.size > len(data):
        raise ValueError(f"its member {name} lies outside the file")
    signature, flags, method, name_length, extra_length = _LOCAL_HEADER.unpack_from(data, start)
    stored_name = data[start + _LOCAL_HEADER.size : start + _LOCAL_HEADER.size + name_length]
    expected = info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437")
    if signature != b"PK\3\4" or stored_name != expected:
        raise ValueError(f"its member {name} has another name or none at its place")
    if info.compress_type or method or size != info.compress_size or (info.flag_bits | flags) & 1:
        raise ValueError(f"its member {name} is compressed or encrypted, which torch.save never does")
    start += _LOCAL_HEADER.size + name_length + extra_length
    if start + size > len(data):
        raise ValueError(f"its member {name} lies outside the file")
    return start, size


def _byte_order(data: mmap.mmap, members: dict[str, zipfile.ZipInfo]) -> str:
    """Return NumPy's sign for the byte order of the storages. Files older than the record are little-endian."""
    if "byteorder" not in members:
        return "<"
    start, size = _span(data, members, "byteorder")
    order = data[start : start + min(size, 16)]
    if order not in (b"little", b"big"):
        raise ValueError(f"its byteorder is {_quoted(order)}, neither little nor big")
    return "<" if order == b"little" else ">"


def _storage_start(data: mmap.mmap, members: dict[str, zipfile.ZipInfo], storage: _Storage) -> int:
    """Return where a storage's numbers start; a ValueError unless its member has exactly their size."""
    start, size = _span(data, members, f"data/{storage.key}")
    expected = storage.length * _DTYPES[storage.dtype].itemsize
    if size != expected:
        raise ValueError(f"its member data/{storage.key} has {size} bytes, its data.pkl needs {expected}")
    return start


def _tensors(value: Any) -> dict[str, _Description]:
    """Return the pickle's value if it is a dictionary of tensors, or raise a ValueError."""
    if type(value) is not dict:
        raise ValueError(f"its data.pkl holds {_kind(value)}, not a dictionary of tensors")
    for name, tensor in value.items():
        if type(tensor) is not _Description:
            keys = ", ".join(_quoted(key) for key in list(value)[:3])
            raise ValueError(
                f"its data.pkl holds {_kind(tensor)} under {_quoted(name)}, where a tensor is expected (the first keys "
                f"are {keys})"
            )
        if not name.isprintable():
            raise ValueError(f"the name of its tensor {_quoted(name)} is not printable")
    storages: dict[str, _Storage] = {}
    for tensor in value.values():
        if storages.setdefault(tensor.storage.key, tensor.storage) != tensor.storage:
            raise ValueError(f"its data.pkl describes data/{tensor.storage.key} in two ways")
    return value


class _Machine:
    """A pickle machine whose only values are constants, tuples, dictionaries, and the descriptions above.

    Every method raises a ValueError for a program that `torch.save` does not write for a dictionary of tensors.
    """

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._below_marks: list[list[Any]] = []  # the stack up to each open mark
        self._memo: dict[int, Any] = {}

    def run(self, program: bytes) -> Any:
        """Return the value that a pickle describes."""
        for count, (opcode, argument) in enumerate(_opcodes(program)):
            if count >= _MAX_OPCODES:
                raise ValueError(f"its data.pkl has over {_MAX_OPCODES} opcodes, more than any model needs")
            self._step(opcode, argument)
        result = self._pop()
        if self._stack or self._below_marks:
            raise ValueError("its data.pkl ends with unused values")
        return result

    def _step(self, opcode: str, argument: Any) -> None:
        match opcode:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE":
                self._stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE" | "EMPTY_TUPLE":
                self._stack.append(_CONSTANTS[opcode])
            case "EMPTY_DICT":
                self._stack.append({})
            case "MARK":
                self._below_marks.append(self._stack)
                self._stack = []
            case "TUPLE":
                values = self._pop_to_mark()
                self._stack.append(tuple(values))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                values = [self._pop() for _ in range(int(opcode[-1]))]
                self._stack.append(tuple(reversed(values)))
            case "SETITEM":
                value, key = self._pop(), self._pop()
                self._set_items([key, value])
            case "SETITEMS":
                self._set_items(self._pop_to_mark())
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = self._top()
            case "MEMOIZE":
                self._memo[len(self._memo)] = self._top()
            case "BINGET" | "LONG_BINGET":
                if argument not in self._memo:
                    raise ValueError(f"its data.pkl reads memo {argument}, which is empty")
                self._stack.append(self._memo[argument])
            case "GLOBAL":
                self._stack.append(_name(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = self._pop(), self._pop()
                self._stack.append(_name(module, name))
            case "BINPERSID":
                self._stack.append(_storage(self._pop()))
            case "REDUCE":
                arguments, function = self._pop(), self._pop()
                self._stack.append(_reduced(function, arguments))
            case "BUILD":
                state = self._pop()
                # A module's state_dict carries its modules' versions as an attribute. They describe no tensor.
                if type(self._top()) is not dict or type(state) is not dict or list(state) != ["_metadata"]:
                    raise ValueError(f"its data.pkl sets the attributes of {_kind(self._top())}")
            case _:
                raise ValueError(f"its data.pkl has the opcode {opcode}, which no dictionary of tensors needs")

    def _top(self) -> Any:
        if not self._stack:
            raise ValueError("its data.pkl takes more values than it has")
        return self._stack[-1]

    def _pop(self) -> Any:
        self._top()
        return self._stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        if not self._below_marks:
            raise ValueError("its data.pkl takes more values than it has")
        values, self._stack = self._stack, self._below_marks.pop()
        return values

    def _set_items(self, keys_and_values: list[Any]) -> None:
        """Put keys and values, in turn, into the dictionary on top of the stack."""
        target, keys, values = self._top(), keys_and_values[::2], keys_and_values[1::2]
        if type(target) is not dict or len(keys) != len(values):
            raise ValueError(f"its data.pkl puts items into {_kind(target)}")
        for key, value in zip(keys, values, strict=True):
            if type(key) is not str:  # hashing nested tuples can take exponential time
                raise ValueError(f"its data.pkl has {_kind(key)} as a key")
            if key in target:
                raise ValueError(f"its data.pkl has the key {_quoted(key)} twice")
            target[key] = value


def _opcodes(program: bytes) -> Iterator[tuple[str, Any]]:
    """Yield the name and the argument of each opcode, up to STOP."""
    try:
        for opcode, argument, _ in pickletools.genops(program):
            yield opcode.name, argument
    except ValueError as error:
        raise ValueError(f"its data.pkl is not a whole pickle ({error})") from error


def _name(module: Any, name: Any) -> _Name:
    dotted = f"{module}.{name}" if type(module) is str and type(name) is str else _kind((module, name))
    if dotted not in _NAMES:
        raise ValueError(f"its data.pkl names {_quoted(dotted)}, which is not needed for tensors and never run")
    return _Name(dotted)


def _storage(reference: Any) -> _Storage:
    """Return the storage of a persistent id: ("storage", type, key, device, length)."""
    if type(reference) is tuple and len(reference) == 5 and type(reference[1]) is _Name:
        kind, name, key, _, length = reference
        has_key = type(key) is str and re.fullmatch(r"[0-9]{1,20}", key)
        if type(kind) is str and kind == "storage" and name.dotted in _STORAGES and has_key and _is_size(length):
            return _Storage(key, _STORAGES[name.dotted], length)
    raise ValueError("its data.pkl refers to something other than a storage of numbers")


def _reduced(function: Any, arguments: Any) -> Any:
    """Return what the call of a name with arguments describes."""
    dotted = function.dotted if type(function) is _Name else ""
    if type(arguments) is tuple:
        if dotted == _ORDERED_DICT and not arguments:
            return {}
        if dotted == _PARAMETER and len(arguments) == 3:
            tensor, requires_grad, hooks = arguments
            if type(tensor) is _Description and type(requires_grad) is bool and _is_empty(hooks):
                return tensor
        if dotted == _TENSOR and len(arguments) in (6, 7):
            *place, requires_grad = arguments[:5]
            if type(requires_grad) is bool and all(map(_is_empty, arguments[5:])):
                return _description(*place)
    raise ValueError(f"its data.pkl calls {_quoted(dotted) if dotted else _kind(function)} with other arguments")


def _description(storage: Any, offset: Any, shape: Any, strides: Any) -> _Description:
    """Return a tensor's description if it lies inside its storage and no two entries share a number."""
    axes_are_tuples = type(shape) is tuple and type(strides) is tuple
    if type(storage) is not _Storage or not axes_are_tuples or len(shape) != len(strides) or len(shape) > _MAX_AXES:
        raise ValueError("its data.pkl has a tensor without a storage, a shape, or strides")
    if not all(map(_is_size, (offset, *shape, *strides))):
        raise ValueError("its data.pkl has a tensor whose offset, shape, or strides are not sizes")
    spans = [(size - 1) * stride for size, stride in zip(shape, strides, strict=True)]
    end = offset + sum(spans) + 1 if all(shape) else offset
    if end > storage.length or math.prod(filter(None, shape)) > _MAX_SIZE:
        raise ValueError(
            f"its data.pkl has a tensor of shape {list(shape)} at {offset} with strides {list(strides)}, beyond the "
            f"{storage.length} numbers of data/{storage.key}"
        )
    if all(shape) and _overlaps(shape, strides):
        raise ValueError(f"its data.pkl has a tensor of shape {list(shape)} with overlapping strides {list(strides)}")
    return _Description(storage, offset, shape, strides)


def _overlaps(shape: Iterable[int], strides: Iterable[int]) -> bool:
    """Return whether a stride is too short to step over all shorter ones, as it is not in a slice of a whole array."""
    reach = 0
    for stride, size in sorted((stride, size) for size, stride in zip(shape, strides, strict=True) if size > 1):
        if stride <= reach:
            return True
        reach += (size - 1) * stride
    return False


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_SIZE


def _is_empty(value: Any) -> bool:
    """Return whether this is nothing or an empty dictionary, as a tensor's hooks and metadata must be."""
    return value is None or (type(value) is dict and not value)


def _kind(value: Any) -> str:
    """Return what a value is; its content may be huge."""
    kinds = {
        _Name: "a name",
        _Storage: "a storage",
        _Description: "a tensor",
        dict: "a dictionary",
        str: "a text",
        int: "a number",
        float: "a number",
        type(None): "None",
    }
    return kinds.get(type(value), f"a {type(value).__name__}")


def _quoted(text: str | bytes) -> str:
    """Return text from the file in quotes, in ASCII and cut to a readable length."""
    return ascii(text[:100])
