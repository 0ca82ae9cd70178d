"""Files of ``torch.save``, without PyTorch and without running what they say.

A pickle is a program: it names classes and functions and calls them. Here every name that is not
a tensor's becomes an :class:`Inert` placeholder of that name, which keeps what it is given and
does nothing; no module is imported. So weights can be read from beside whatever a training script
saved with them, and out of a module that was pickled whole.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np

from prism_jax.data.weight_files.contents import Contents
from prism_jax.errors import UserError

MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of the format before 1.6

_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
    "UntypedStorage": np.uint8,  # of dtypes that have no storage of their own
}
_INTEGERS = ("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8")
_HALVES = ("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
_DTYPES = {
    "bool": np.bool_,
    **{name: getattr(np, name) for name in ("float64", "float32", "float16", *_INTEGERS)},
    **{name: getattr(ml_dtypes, name) for name in _HALVES},
}


class Inert:
    """Stands for whatever a pickle names, calls or makes: it keeps, and does nothing.

    The unpickler reaches it by each of its instructions: a call (REDUCE, NEWOBJ, OBJ, INST), a
    state (BUILD), items (SETITEM), entries (APPEND, ADDITEMS). It has no attributes but these.
    """

    __slots__ = ("args", "items", "state")
    args: tuple[Any, ...]
    items: dict[Any, Any]
    state: Any

    def __new__(cls, *args: Any, **_: Any) -> Any:
        made = object.__new__(cls)
        made.args, made.items, made.state = args, {}, None
        return made

    def __call__(self, *args: Any, **_: Any) -> Inert:
        return Inert(self, *args)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, value: Any) -> None:
        self.items[len(self.items)] = value

    add = append

    def extend(self, values: Any) -> None:
        for value in values:
            self.append(value)


class Tensor(NamedTuple):
    """A tensor whose bytes may come later in the file; offset and strides in elements."""

    storage: str
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _DType(NamedTuple):
    dtype: np.dtype


class _StorageType(NamedTuple):
    dtype: np.dtype


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    start: int


# What a pickle may call. They are classes, since a pickle could set attributes of a function;
# of a class it calls __setstate__, which here wants an instance.


class _Rebuild(Inert):
    """torch._utils._rebuild_tensor and _rebuild_tensor_v2; one of them ends with a dtype."""

    def __new__(cls, *args: Any) -> Any:
        match args:
            case (_Storage() as storage, offset, shape, stride, *rest):
                numbers = (offset, *shape, *stride)
                if not all(type(n) is int for n in numbers) or len(shape) != len(stride):
                    raise pickle.UnpicklingError("a tensor's shape is not made of whole numbers")
                dtype = next((r.dtype for r in rest if isinstance(r, _DType)), storage.dtype)
                start, odd = divmod(storage.start * storage.dtype.itemsize, dtype.itemsize)
                if odd:
                    raise pickle.UnpicklingError("a tensor begins within a number")
                return Tensor(storage.key, dtype, start + offset, tuple(shape), tuple(stride))
        return super().__new__(cls, *args)


class _First(Inert):
    """torch._utils._rebuild_parameter: its first argument, a tensor."""

    def __new__(cls, tensor: Any, *_: Any) -> Any:
        return tensor


class _OfType(Inert):
    """torch._tensor._rebuild_from_type_v2: a tensor of a subclass."""

    def __new__(cls, rebuild: Any, kind: Any, args: Any, *_: Any) -> Any:
        known = rebuild in (_Rebuild, _First, _OfType)
        return rebuild(*args) if known else super().__new__(cls, rebuild, kind, args)


class _List(Inert):
    """A set, whose members need not be hashable here."""

    def __new__(cls, values: Any = ()) -> Any:
        return list(values) if isinstance(values, (list, tuple)) else []


class _Size(Inert):
    """torch.Size."""

    def __new__(cls, values: Any = ()) -> Any:
        return tuple(values) if isinstance(values, (list, tuple)) else ()


class _Encoded(Inert):
    """_codecs.encode: bytes, which a pickle that Python 2 can read holds as text."""

    def __new__(cls, text: Any = "", *_: Any) -> Any:
        return text.encode("latin1") if isinstance(text, str) else b""


class _NumpyDType(Inert):
    """numpy.dtype: a code as "f4"; the byte order is the second part of its state."""

    __slots__ = ()

    def dtype(self) -> np.dtype | None:
        code, state = self.args[0] if self.args else None, self.state
        order: Any = state[1] if isinstance(state, tuple) and len(state) > 1 else "="
        if not isinstance(code, str) or not re.fullmatch(r"[fiub][1248]", code):
            return None
        return np.dtype(code).newbyteorder(order) if order in ("<", ">", "|", "=") else None


class _NumpyArray(Inert):
    """numpy's _reconstruct: the array is its state: version, shape, dtype, column-major, bytes."""

    __slots__ = ()

    def array(self) -> np.ndarray | None:
        match self.state:
            case (_, tuple(shape), _NumpyDType() as kind, column_major, bytes(data)):
                return _values(data, kind, shape, "F" if column_major else "C")
        return None


class _NumpyBuffer(_NumpyArray):
    """numpy's _frombuffer, of protocol 5: bytes, dtype, shape, order."""

    __slots__ = ()

    def array(self) -> np.ndarray | None:
        match self.args:
            case (bytes() | bytearray() as data, _NumpyDType() as kind, tuple(shape), order, *_):
                return _values(bytes(data), kind, shape, "F" if order == "F" else "C")
        return None


def _values(
    data: bytes, kind: _NumpyDType, shape: tuple[Any, ...], order: Literal["C", "F"]
) -> np.ndarray | None:
    dtype = kind.dtype()
    if dtype is None or math.prod(shape) * dtype.itemsize != len(data):
        return None
    values = np.frombuffer(data, dtype).astype(dtype.newbyteorder("="))
    return values.reshape(shape, order=order)


class _Dict(dict):
    """An ordered or default dict."""

    __slots__ = ()

    def __init__(self, *args: Any):
        super().__init__(args[0] if args and isinstance(args[0], (dict, list)) else ())

    def __setstate__(self, _: Any) -> None:
        pass


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Dict,
    ("collections", "defaultdict"): _Dict,
    ("builtins", "set"): _List,
    ("__builtin__", "set"): _List,
    ("_codecs", "encode"): _Encoded,
    ("numpy", "dtype"): _NumpyDType,
    ("numpy.core.multiarray", "_reconstruct"): _NumpyArray,
    ("numpy._core.multiarray", "_reconstruct"): _NumpyArray,
    ("numpy.core.numeric", "_frombuffer"): _NumpyBuffer,
    ("numpy._core.numeric", "_frombuffer"): _NumpyBuffer,
    ("torch", "Size"): _Size,
    ("torch._utils", "_rebuild_tensor"): _Rebuild,  # before 0.4
    ("torch._utils", "_rebuild_tensor_v2"): _Rebuild,
    ("torch._utils", "_rebuild_tensor_v3"): _Rebuild,
    ("torch._utils", "_rebuild_parameter"): _First,
    ("torch._utils", "_rebuild_parameter_with_state"): _First,
    ("torch._tensor", "_rebuild_from_type_v2"): _OfType,
}


class Unpickler(pickle.Unpickler):
    """An unpickler that makes tensors, plain values and placeholders, and nothing else.

    Attributes:
      itemsize: of every storage that was named.
      named: the placeholders' classes, by their names.
    """

    def __init__(self, stream: io.BytesIO):
        super().__init__(stream, encoding="latin1")  # a Python 2 string may hold any bytes
        self.itemsize: dict[str, int] = {}
        self.named: dict[str, type[Inert]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _StorageType(np.dtype(_STORAGES[name]))
        if module == "torch" and name in _DTYPES:
            return _DType(np.dtype(_DTYPES[name]))
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        full = f"{module}.{name}"
        return self.named.setdefault(full, type("Inert", (Inert,), {"__slots__": ()}))

    def persistent_load(self, pid: Any) -> Any:
        match pid:
            case ("storage", _StorageType(dtype), key, _, _, *view):
                self.itemsize[str(key)] = dtype.itemsize
                start = view[0][1] if view and view[0] else 0  # (its name, offset, size)
                return _Storage(str(key), dtype, start)
            case ("module", kind, *_):  # with its source, which is left unread
                return kind
        return Inert(pid)


def unpickle(stream: io.BytesIO) -> tuple[Any, Unpickler]:
    """Read the pickle at which a stream stands, and leave the stream behind it."""
    check_numbers(stream)
    unpickler = Unpickler(stream)
    return unpickler.load(), unpickler


def check_numbers(stream: io.BytesIO) -> None:
    """Look through the pickle at which a stream stands, and leave the stream there.

    An unpickler keeps a table with as many entries as the largest number that the pickle gives to
    an object: gigabytes, for a file of a few bytes.

    Raises:
      UnpicklingError: a number is larger than there can be objects.
    """
    start = stream.tell()
    for opcode, argument, at in pickletools.genops(stream):
        if not opcode.name.endswith("PUT"):
            continue
        assert argument is not None and at is not None  # it has one, and the stream tells
        if argument > at - start:
            raise pickle.UnpicklingError(f"it numbers an object {argument} that is not there yet")
    stream.seek(start)


def tensors_of(found: Any) -> dict[tuple[str, ...], Tensor | np.ndarray]:
    """Every tensor and array of what was unpickled, by the keys that lead to it.

    A module that was pickled whole gives the names of its state dict.
    """
    seen: set[int] = set()

    def walk(found: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
        if isinstance(found, Tensor):
            yield path, found
        elif isinstance(found, _NumpyArray) and (array := found.array()) is not None:
            yield path, array
        if not isinstance(found, (dict, list, tuple, Inert)) or isinstance(found, Tensor):
            return
        if id(found) in seen:  # lists may hold one another, or themselves
            return
        seen.add(id(found))
        if isinstance(found, dict):
            for key, value in found.items():
                yield from walk(value, (*path, str(key)))
        elif isinstance(found, Inert):
            yield from walk_object(found, path)
        else:
            for place, value in enumerate(found):
                yield from walk(value, (*path, str(place)))

    def walk_object(found: Inert, path: tuple[str, ...]):
        states = found.state if isinstance(found.state, tuple) else (found.state,)
        for part in (*found.args, found.items, *states):
            if isinstance(part, dict) and isinstance(part.get("_modules"), dict):
                seen.add(id(part))
                temporary = part.get("_non_persistent_buffers_set") or ()
                for group in ("_parameters", "_buffers", "_modules"):
                    for name, value in (part.get(group) or {}).items():
                        if group != "_buffers" or name not in temporary:
                            yield from walk(value, (*path, str(name)))
            else:
                yield from walk(part, path)

    return dict(walk(found, ()))


def is_legacy(data: bytes) -> bool:
    """Whether a file is of the format before 1.6."""
    return MAGIC.to_bytes(10, "little") in data[:32]


def read_zip(archive: zipfile.ZipFile) -> Contents:
    """Read the format since 1.6: a zip of one pickle and one file per storage.

    TorchScript's archives are of the same make, with the network's code beside it.
    """
    (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
    root = pickled.removesuffix("data.pkl")
    for entry in archive.infolist():  # TorchScript compresses its code, which is not read
        if entry.compress_type != zipfile.ZIP_STORED and entry.filename.startswith(f"{root}data"):
            raise zipfile.BadZipFile("it is compressed, which torch.save never does")
    order = f"{root}byteorder"
    if order in archive.namelist() and archive.read(order) != b"little":
        raise UserError("it was written by a big-endian machine; save it as .safetensors")
    found, unpickler = unpickle(io.BytesIO(archive.read(pickled)))
    tensors = tensors_of(found)

    def array(tensor: Tensor | np.ndarray) -> np.ndarray:
        if isinstance(tensor, np.ndarray):
            return tensor
        return _array(tensor, archive.read(f"{root}data/{tensor.storage}"))

    script = f"{root}constants.pkl" in archive.namelist()
    kind = "TorchScript module" if script else "PyTorch weights"
    return Contents(kind, tensors, array, () if script else tuple(unpickler.named))


def read_legacy(data: bytes) -> Contents:
    """Read the format before 1.6: four pickles, then the storages that the last of them lists."""
    stream = io.BytesIO(data)
    _, _, system = (unpickle(stream)[0] for _ in range(3))
    if not system["little_endian"]:
        raise UserError("it was written by a big-endian machine; save it as .safetensors")
    found, unpickler = unpickle(stream)
    tensors, storages = tensors_of(found), {}
    for key in unpickle(stream)[0]:
        (count,) = struct.unpack("<q", stream.read(8))
        size = count * unpickler.itemsize[key]
        storages[key] = stream.read(size) if count >= 0 else b""
        if len(storages[key]) != size:
            raise EOFError(f"storage {key} is cut off")

    def array(tensor: Tensor | np.ndarray) -> np.ndarray:
        if isinstance(tensor, np.ndarray):
            return tensor
        return _array(tensor, storages[tensor.storage])

    return Contents("PyTorch weights", tensors, array, tuple(unpickler.named))


def read_pickle(data: bytes) -> Contents:
    """Read a pickle that is not torch.save's, of NumPy arrays."""
    found, unpickler = unpickle(io.BytesIO(data))
    kind = "pickle of NumPy arrays"
    return Contents(kind, tensors_of(found), np.asarray, tuple(unpickler.named))


def _array(tensor: Tensor, storage: bytes) -> np.ndarray:
    """A tensor that lies, with its strides, within its storage."""
    values = np.frombuffer(storage, tensor.dtype)
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride, strict=True))
    sound = min((tensor.offset, *tensor.shape, *tensor.stride)) >= 0
    size = math.prod(tensor.shape)
    if not sound or (size and tensor.offset + reach >= len(values)) or size > len(values):
        if sound and 0 in tensor.stride and tensor.offset + reach < len(values):
            raise UserError(
                f"a tensor of shape {tensor.shape} repeats {len(values)} numbers (torch's expand), "
                "which is not read; save it with .contiguous()"
            )
        raise EOFError(f"tensor of shape {tensor.shape} reaches beyond its storage")
    strides = [s * tensor.dtype.itemsize for s in tensor.stride]
    return np.lib.stride_tricks.as_strided(values[tensor.offset :], tensor.shape, strides).copy()
