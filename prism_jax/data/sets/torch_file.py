"""Files of ``torch.save`` without PyTorch: tensors as NumPy arrays, in lists, tuples and dicts.

    archive/data.pkl     a pickle (protocol 2) of the object, with its storages left out
    archive/data/<key>   the bytes of each storage
    archive/byteorder, archive/version

A pickle is a program. Reading knows tensors, numbers and containers and refuses all else; nothing
is run. Writing spells the few instructions that are needed, since a pickler would have to import
the names it writes.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from prism_jax.data.weight_files.torch_files import check_numbers, is_legacy
from prism_jax.errors import UserError

STORAGES: dict[str, Any] = {
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
}
_STORAGE_OF = {np.dtype(dtype): name for name, dtype in STORAGES.items()}

# The tables of a zip file have no other time than the one it was written at.
_EPOCH = (1980, 1, 1, 0, 0, 0)

# What bytes that are no such file raise.
_BROKEN = (
    *(AttributeError, EOFError, IndexError, KeyError, OverflowError, TypeError, ValueError),
    *(MemoryError, RecursionError, NotImplementedError, struct.error),
    *(pickle.UnpicklingError, zipfile.BadZipFile),
    *(zlib.error, RuntimeError),  # of a member that is damaged, or encrypted
)


def load(path: epath.PathLike) -> Any:
    """Read what ``torch.save`` wrote, in the format of PyTorch 1.6 or in the older one.

    Raises:
      UserError: it is no such file, is damaged, or holds more than tensors, numbers, text and
        containers of them.
    """
    path = epath.Path(path)
    data = path.read_bytes()
    if not data.startswith(b"PK") and not is_legacy(data):
        raise UserError(
            f"{path} is not written by torch.save; load it in the program that wrote it and save "
            "its tensors with torch.save"
        )
    try:
        if is_legacy(data):
            return _load_legacy(data)
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return _load(archive)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except _BROKEN as error:
        raise UserError(
            f"{path} is damaged or no file of torch.save ({type(error).__name__}: {error}); fetch "
            "it again"
        ) from error


def _load(archive: zipfile.ZipFile) -> Any:
    (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
    root = pickled.removesuffix("data.pkl")
    order = f"{root}byteorder"
    if order in archive.namelist() and archive.read(order) != b"little":
        raise UserError("it was written by a big-endian machine; save it again on another")
    stored: dict[str, bytes] = {}

    def storage(key: str, _: int) -> bytes:
        if key not in stored:
            stored[key] = archive.read(f"{root}data/{key}")
        return stored[key]

    return _unpickled(io.BytesIO(archive.read(pickled)), storage)


def _load_legacy(data: bytes) -> Any:
    """Four pickles, then the storages that the last of them lists; the third is the object.

    It is read twice: with empty storages, to find where they lie, and with them.
    """
    stream, sizes, stored = io.BytesIO(data), dict[str, int](), dict[str, bytes]()

    def empty(key: str, size: int) -> bytes:
        sizes[key] = size
        if not 0 <= size <= len(data):
            raise EOFError(f"storage {key} is cut off")
        return bytes(size)

    _, _, system = (_unpickled(stream, empty) for _ in range(3))
    if not system["little_endian"]:
        raise UserError("it was written by a big-endian machine; save it again on another")
    start = stream.tell()
    _unpickled(stream, empty)
    for key in _unpickled(stream, empty):
        stream.seek(8, io.SEEK_CUR)  # its length, which is known
        stored[key] = stream.read(sizes[key])
        if len(stored[key]) != sizes[key]:
            raise EOFError(f"storage {key} is cut off")
    stream.seek(start)
    return _unpickled(stream, lambda key, _: stored[key])


def _unpickled(stream: io.BytesIO, storage: Callable[[str, int], bytes]) -> Any:
    check_numbers(stream)
    return _Unpickler(stream, storage).load()


class _StorageType(NamedTuple):
    dtype: np.dtype


class _NumpyType:
    """What stands in a pickle for a dtype."""

    def __init__(self, name: bytes | str, *_: Any):
        self.name = name if isinstance(name, str) else name.decode()
        self.order = "<"

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]


def _scalar(kind: _NumpyType, data: bytes | str) -> bool | int | float:
    """A NumPy number, as a Python one."""
    data = data.encode("latin1") if isinstance(data, str) else data
    if kind.name not in ("b1", *(f"{k}{n}" for k in "iuf" for n in (1, 2, 4, 8))):
        raise UserError(f"it holds a number of type {kind.name!r}")
    order: Literal["<", ">", "="]
    order = "<" if kind.order == "<" else ">" if kind.order == ">" else "="
    return np.frombuffer(data, np.dtype(kind.name).newbyteorder(order), 1)[0].item()


def _tensor(storage: tuple[np.dtype, bytes], offset: int, shape, stride, *_: Any) -> np.ndarray:
    """A tensor that lies, with its strides, within its storage."""
    dtype, data = storage
    values = np.frombuffer(data, dtype)
    reach = sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    size = math.prod(shape)
    sound = min((offset, *shape, *stride)) >= 0
    if not sound or (size and offset + reach >= len(values)) or size > len(values):
        if sound and 0 in stride and offset + reach < len(values):
            raise UserError(
                f"a tensor of shape {tuple(shape)} repeats {len(values)} numbers (torch's expand), "
                "which is not read; save it with .contiguous()"
            )
        raise EOFError(f"a tensor of shape {tuple(shape)} reaches beyond its storage")
    strides = [s * values.itemsize for s in stride]
    return np.lib.stride_tricks.as_strided(values[offset:], tuple(shape), strides).copy()


_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): lambda *_: {},
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor"): _tensor,  # before 0.4
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    ("numpy", "dtype"): _NumpyType,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("_codecs", "encode"): lambda text, _: text.encode("latin1"),  # bytes, in protocol 2
    ("builtins", "list"): list,
}


class _Unpickler(pickle.Unpickler):
    """Knows tensors, numbers and containers, and refuses everything else."""

    def __init__(self, stream: io.BytesIO, storage: Callable[[str, int], bytes]):
        """Args: storage: the bytes of a storage, by its key and its size in bytes."""
        super().__init__(stream)
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.storage") and name in STORAGES:
            return _StorageType(np.dtype(STORAGES[name]))
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        raise UserError(
            f"it asks to load {module}.{name}, which is no tensor; nothing of it was run. Save "
            "the tensors alone"
        )

    def persistent_load(self, pid: Any) -> tuple[np.dtype, bytes]:
        kind, storage, key, _, count, *view = pid
        if kind != "storage" or not isinstance(storage, _StorageType) or any(view):
            raise pickle.UnpicklingError(f"unknown kind of storage {kind!r}")
        return storage.dtype, self._storage(str(key), int(count) * storage.dtype.itemsize)


# --- writing --------------------------------------------------------------------------------


def save(path: epath.PathLike, value: Any) -> None:
    """Write a file that ``torch.load`` reads, also with ``weights_only=True``.

    Equal values give equal bytes.

    Args:
      value: None, numbers, text, NumPy arrays (they become tensors), and lists, tuples and dicts
        of them.
    """
    storages: list[np.ndarray] = []
    pickled = b"\x80\x02" + b"".join(_spell(value, storages)) + b"."
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:

        def add(name: str, data: bytes) -> None:
            archive.writestr(zipfile.ZipInfo(f"archive/{name}", _EPOCH), data)

        add("data.pkl", pickled)
        add("byteorder", b"little")
        for key, array in enumerate(storages):
            add(f"data/{key}", array.astype(array.dtype.newbyteorder("<")).tobytes())
        add("version", b"3\n")
    epath.Path(path).write_bytes(buffer.getvalue())


def _spell(value: Any, storages: list[np.ndarray]) -> list[bytes]:
    """The pickle instructions that put a value on the stack."""

    def all_of(values: Any) -> list[bytes]:
        return [part for v in values for part in _spell(v, storages)]

    match value:
        case None:
            return [b"N"]
        case bool():
            return [b"\x88" if value else b"\x89"]
        case int():
            digits = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            return [b"\x8a", bytes([len(digits)]), digits]
        case float():
            return [b"G", struct.pack(">d", value)]
        case str():
            text = value.encode()
            return [b"X", struct.pack("<I", len(text)), text]
        case list():
            return [b"](", *all_of(value), b"e"]
        case tuple():
            return [b"(", *all_of(value), b"t"]
        case dict():
            return [b"}(", *all_of(x for item in value.items() for x in item), b"u"]
        case np.ndarray():
            return _spell_tensor(value, storages)
    raise TypeError(f"{type(value).__name__} is neither a number, text, array nor container")


def _spell_tensor(array: np.ndarray, storages: list[np.ndarray]) -> list[bytes]:
    key = str(len(storages))
    shape, array = array.shape, np.ascontiguousarray(array)  # which makes a scalar one long
    storages.append(array)
    stride = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    kind = _STORAGE_OF[array.dtype]
    return [
        b"ctorch._utils\n_rebuild_tensor_v2\n((",
        *_spell("storage", storages),
        f"ctorch\n{kind}\n".encode(),
        *(part for v in (key, "cpu", array.size) for part in _spell(v, storages)),
        b"tQ",  # a tuple, by which the storage is looked up
        *(part for v in (0, shape, stride, False) for part in _spell(v, storages)),
        b"ccollections\nOrderedDict\n)R",
        b"tR",
    ]
