"""PyTorch weight files into flax variables, without PyTorch and without running what they say.

Module names are PyTorch's, so a tensor's name is the path of its leaf, joined with dots, and
one table of leaves serves every architecture. Files that name their tensors otherwise have a row
in ``layouts.LAYOUTS``.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from etils import epath

from prism_jax.errors import UserError
from prism_jax.models.layouts import rename
from prism_jax.models.registry import ARCHITECTURES, build, check_image_size
from prism_jax.types import PyTree

LEAVES = {
    ("params", "kernel"): "weight",
    ("params", "scale"): "weight",
    ("batch_stats", "mean"): "running_mean",
    ("batch_stats", "var"): "running_var",
}
WRAPPERS = ("state_dict", "model_state_dict", "model", "net")


class Leaf(NamedTuple):
    """Where one tensor goes: its path from the collection on, its shapes here and in PyTorch."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    torch_shape: tuple[int, ...]


def fit(
    tensors: dict[str, np.ndarray],
    path: str,
    architecture: str,
    num_classes: int,
    *,
    image_shape: tuple[int, int, int],
    width: float = 1.0,
    depth: float = 1.0,
    stem: str = "imagenet",
) -> PyTree:
    """Lay out a file's tensors as the variables of an architecture.

    Args:
      tensors: by our names, in PyTorch's layout.
      path: where they are from, for messages.
      architecture: a key of ``ARCHITECTURES``.
      num_classes, width, depth, stem: as for ``build``.
      image_shape: (height, width, channels) of the images it will read.

    Returns:
      Float32 NumPy arrays: "params" and "batch_stats" (empty without BatchNorm).

    Raises:
      UserError: they do not fit; everything that does not is told at once.
    """
    check_image_size(architecture, min(image_shape[:2]), stem)
    module = build(architecture, num_classes, width=width, depth=depth, stem=stem)
    shapes = variable_shapes(module, image_shape)
    leaves = torch_leaves(shapes)
    missing, unused = leaves.keys() - tensors.keys(), tensors.keys() - leaves.keys()
    misshapen = {
        name: leaf
        for name, leaf in leaves.items()
        if name in tensors and tensors[name].shape != leaf.torch_shape
    }
    if not (missing or unused or misshapen):
        return {"batch_stats": {}, **from_state_dict(tensors, shapes, np.float32)}

    def due_to(other_shape: tuple[int, int, int]) -> set[str]:
        other = torch_leaves(variable_shapes(module, other_shape))
        return {n for n in misshapen if other[n].torch_shape != leaves[n].torch_shape}

    rows, columns, channels = image_shape
    hints, head = [], _head(tensors, misshapen, num_classes)
    if head is not None:
        if not (missing or unused) and len(misshapen) <= 2:
            raise UserError(_other_head(path, architecture, head, num_classes))
        hints.append(f"Its head has {head} classes; {num_classes} were asked for.")
    if due_to((2 * rows, 2 * columns, channels)):
        hints.append(f"It is for images of another size than {rows} x {columns} px: state theirs.")
    for name in due_to((rows, columns, channels + 1)):
        hints.append(f"It reads {tensors[name].shape[1]} channels; the images have {channels}.")
    raise UserError(
        _misfit(path, architecture, tensors, sorted(missing), sorted(unused), misshapen, hints)
    )


def _head(tensors: dict, misshapen: dict[str, Leaf], num_classes: int) -> int | None:
    """The file's number of classes, where it is another one than asked for."""
    for name, leaf in misshapen.items():
        if leaf.torch_shape == (num_classes,) and tensors[name].ndim == 1:
            return tensors[name].shape[0]
    return None


def _other_head(path: str, architecture: str, head: int, num_classes: int) -> str:
    """What can be done with weights of a head of another size."""
    lines = [f"{path} is a {architecture} with a head of {head} classes; {num_classes} were asked:"]
    if head > num_classes:
        lines.append(
            f"  - if the {num_classes} are among the {head}, keep the head and pick them: in a "
            f"config networks.NAME.head_classes={head} and networks.NAME.class_indices=(4, 0, ...) "
            f"(`python -m prism_jax.tools.teachers evaluate ... --class-indices=find` finds them "
            f"by images), in Python num_classes={head}"
        )
    lines.append(
        "  - if they are other classes, it needs a new head: leave the weights out, so that the "
        "network is trained, or replace and train its last layer elsewhere"
    )
    return "\n".join(lines)


def from_state_dict(tensors: dict[str, np.ndarray], like: PyTree, dtype: np.dtype) -> PyTree:
    """Lay out tensors with our names as variables.

    Args:
      tensors: by name, in PyTorch's layout; just those of ``like``.
      like: variables, or their shapes.
      dtype: of the result.
    """

    def convert(keys: Any, leaf: Any) -> np.ndarray:
        path = _names(keys)
        tensor = tensors[_torch_name(path)]
        if path[-1] == "kernel":
            tensor = tensor.transpose(*range(2, tensor.ndim), 1, 0)
        return np.ascontiguousarray(tensor.reshape(leaf.shape), dtype)

    return jax.tree_util.tree_map_with_path(convert, like)


def to_state_dict(variables: PyTree) -> dict[str, np.ndarray]:
    """Name and lay out variables as PyTorch does: the inverse of :func:`from_state_dict`.

    Returns:
      Tensors by name, in the dtypes given, without BatchNorm's counters.
    """
    flat = {_names(path): np.asarray(leaf) for path, leaf in _flatten(variables)}
    return {_torch_name(path): _to_torch(path, array) for path, array in flat.items()}


def torch_leaves(variables: PyTree) -> dict[str, Leaf]:
    """What a checkpoint of these variables (or their shapes) holds: name to leaf."""
    leaves = {}
    for keys, leaf in _flatten(variables):
        path = _names(keys)
        torch_shape = _to_torch(path, np.broadcast_to(np.float32(0), leaf.shape)).shape
        leaves[_torch_name(path)] = Leaf(path, leaf.shape, torch_shape)
    return leaves


def _flatten(variables: PyTree) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(variables)[0]


def _names(keys: Any) -> tuple[str, ...]:
    return tuple(key.key for key in keys)


def _torch_name(path: tuple[str, ...]) -> str:
    collection, *parents, leaf = path
    return ".".join([*parents, LEAVES.get((collection, leaf), leaf)])


def _to_torch(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    if path[-1] == "kernel":  # HWIO to OIHW, or inputs by features the other way round
        return array.transpose(array.ndim - 1, array.ndim - 2, *range(array.ndim - 2))
    if path[-1].endswith("layer_scale"):
        return array.reshape(-1, 1, 1)
    return array


def variable_shapes(module: nn.Module, image_shape: tuple[int, int, int]) -> PyTree:
    """The shapes of a network's variables for images of (height, width, channels)."""
    images_BHWC = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return jax.eval_shape(module.init, jax.random.key(0, impl="threefry2x32"), images_BHWC)


def _misfit(path, architecture, tensors, missing, unused, misshapen, hints) -> str:
    """Tell everything that does not fit, and what the file looks like instead."""
    shapes = [
        f"{name}: file {tensors[name].shape}, network {leaf.torch_shape}"
        for name, leaf in misshapen.items()
    ]
    lines = [f"{path} does not fit {architecture}:"]
    for what, names in (
        ("missing from the file", missing),
        ("in the file, but not in the network", unused),
        ("of another shape", shapes),
    ):
        if names:
            shown = "; ".join(names[:5]) + ("; ..." if len(names) > 5 else "")
            lines.append(f"  {len(names)} tensors {what}: {shown}")
    lines += [f"  {hint}" for hint in hints]
    likely = guess_architecture(tensors)
    if likely and architecture not in likely:
        lines.append(f"  It looks like {' or '.join(likely)}: state that architecture.")
    elif not hints:
        lines.append("  State the architecture, width, depth and stem it was trained with.")
    return "\n".join(lines)


def guess_architecture(tensors: dict[str, np.ndarray]) -> list[str]:
    """Name the architectures, at width and depth 1, that hold just these tensors but the head.

    Args:
      tensors: by the file's names.
    """
    sizes = sum(t.size for name, t in tensors.items() if ".running_" not in name)
    likely = []
    for name, row in ARCHITECTURES.items():
        if not 0.5 * row.parameters <= sizes <= 2 * row.parameters:
            continue
        ours = rename(tensors, row.weights)
        images = (row.image_size, row.image_size, 3)
        leaves = torch_leaves(variable_shapes(build(name, row.classes), images))
        shapes = {
            n for n, leaf in leaves.items() if n in ours and ours[n].shape != leaf.torch_shape
        }
        if leaves.keys() == ours.keys() and len(shapes) <= 2:
            likely.append(name)
    return likely


def read_checkpoint(path: str, wrappers: tuple[str, ...] = WRAPPERS) -> dict[str, np.ndarray]:
    """Read the tensors of a weight file.

    Args:
      path: ``.pth`` (also ``.pt``, ``.th``; either format of ``torch.save``) or
        ``.safetensors``. A hash in its name, as in ``resnet18-f37072fd.pth``, is checked.
      wrappers: entries that are looked into for the tensors, the first that is there.

    Returns:
      Tensors by name, of the file's dtypes, out of ``state_dict``-like wrappers.

    Raises:
      UserError: no such file; damaged; not what its name promises; more than tensors.
    """
    file = epath.Path(path)
    if not file.is_file():
        raise UserError(f"there is no weight file {path}; give the path of a .pth or .safetensors")
    data = file.read_bytes()
    promised = re.search(r"-([0-9a-f]{8,64})\.[a-z]+$", file.name)
    digest = hashlib.sha256(data).hexdigest()
    if promised and not digest.startswith(promised[1]):
        raise UserError(
            f"{path} is not what its name says: its SHA-256 is {digest[:16]}..., its name "
            f"promises {promised[1]}. It is damaged or another file; fetch it again"
        )
    try:
        if file.suffix == ".safetensors":
            tensors = _read_safetensors(data)
        elif data[:2] == b"PK":
            tensors = _read_zip(data, wrappers)
        else:
            tensors = _read_legacy(data, wrappers)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (
        *(AttributeError, EOFError, IndexError, KeyError, OverflowError, RecursionError),
        *(TypeError, ValueError, struct.error, pickle.UnpicklingError, MemoryError),
        *(zipfile.BadZipFile, NotImplementedError),
    ) as error:
        raise UserError(
            f"{path} cannot be read as a weight file; it is truncated, damaged or of another "
            f"kind ({type(error).__name__}: {error}). Fetch it again, or save the state dict anew"
        ) from error
    if not tensors:
        raise UserError(f"{path} holds no tensors")
    return tensors


# Names of the safetensors format, which its own NumPy reader knows but for BF16.
_SAFE_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def _read_safetensors(data: bytes) -> dict[str, np.ndarray]:
    """The length of a header in JSON, the header, and the tensors' bytes; these are not copied."""
    (length,) = struct.unpack_from("<Q", data)
    header, body = json.loads(data[8 : 8 + length]), memoryview(data)[8 + length :]
    header.pop("__metadata__", None)

    def tensor(dtype: str, shape: list[int], data_offsets: list[int]) -> np.ndarray:
        return np.frombuffer(body[slice(*data_offsets)], _SAFE_DTYPES[dtype]).reshape(shape)

    return {name: tensor(**entry) for name, entry in header.items()}


def _state_dict(found: Any, wrappers: tuple[str, ...]) -> dict[str, _LazyTensor]:
    """Unwrap a training checkpoint down to its tensors."""
    for _ in wrappers:
        if isinstance(found, dict):
            inner = next((found[key] for key in wrappers if isinstance(found.get(key), dict)), None)
            found = found if inner is None else inner
    entries = found.items() if isinstance(found, dict) else ()
    tensors = {name: value for name, value in entries if isinstance(value, _LazyTensor)}
    if not tensors or not all(isinstance(name, str) for name in tensors):
        raise UserError(
            "it holds no state dict; save one with torch.save(model.state_dict(), path)"
        )
    return tensors


_DTYPES = {
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


class _StorageType(NamedTuple):
    dtype: np.dtype


class _LazyTensor(NamedTuple):
    """A tensor whose bytes may come later in the file."""

    storage: str
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _rebuild_tensor(storage, offset, shape, stride, *_) -> _LazyTensor:
    key, dtype = storage
    return _LazyTensor(key, dtype, offset, tuple(shape), tuple(stride))


class _Settings:
    """A training's settings beside its tensors; nobody reads them."""


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("argparse", "Namespace"): _Settings,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,  # before 0.4
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
}


class _TensorUnpickler(pickle.Unpickler):
    """An unpickler that knows tensors and ordered dicts, and refuses everything else.

    Attributes:
      itemsize: of every storage that was named.
    """

    def __init__(self, stream: io.BytesIO):
        super().__init__(stream)
        self.itemsize: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.storage") and name in _DTYPES:
            return _StorageType(np.dtype(_DTYPES[name]))
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        raise UserError(
            f"it asks to load {module}.{name}, which is not a tensor; nothing of it was run. "
            "Save only the state dict: torch.save(model.state_dict(), path)"
        )

    def persistent_load(self, pid: Any) -> tuple[str, np.dtype]:
        kind, storage, key, *_ = pid
        if kind != "storage" or not isinstance(storage, _StorageType):
            raise pickle.UnpicklingError(f"unknown kind of storage {kind!r}")
        self.itemsize[str(key)] = storage.dtype.itemsize
        return str(key), storage.dtype


def _read_zip(data: bytes, wrappers: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The format of ``torch.save`` since 1.6: a zip of one pickle and one file per storage."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise zipfile.BadZipFile("it is compressed, which torch.save never does")
        (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        root = pickled.removesuffix("data.pkl")
        order = f"{root}byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise UserError("it was written by a big-endian machine; save it as .safetensors")
        found = _state_dict(_TensorUnpickler(io.BytesIO(archive.read(pickled))).load(), wrappers)
        return {
            name: _tensor(lazy, archive.read(f"{root}data/{lazy.storage}"))
            for name, lazy in found.items()
        }


_MAGIC = 0x1950A86A20F9469CFC6C


def _read_legacy(data: bytes, wrappers: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The format before 1.6: four pickles, then the storages that the last of them lists."""
    stream = io.BytesIO(data)
    magic, _, system = (_TensorUnpickler(stream).load() for _ in range(3))
    if magic != _MAGIC:
        raise pickle.UnpicklingError("not written by torch.save")
    if not system["little_endian"]:
        raise UserError("it was written by a big-endian machine; save it as .safetensors")
    unpickler = _TensorUnpickler(stream)
    found, storages = _state_dict(unpickler.load(), wrappers), {}
    for key in _TensorUnpickler(stream).load():
        (count,) = struct.unpack("<q", stream.read(8))
        size = count * unpickler.itemsize[key]
        storages[key] = stream.read(size) if count >= 0 else b""
        if len(storages[key]) != size:
            raise EOFError(f"storage {key} is cut off")
    return {name: _tensor(lazy, storages[lazy.storage]) for name, lazy in found.items()}


def _tensor(lazy: _LazyTensor, storage: bytes) -> np.ndarray:
    """A tensor that lies, with its strides, within its storage."""
    values = np.frombuffer(storage, lazy.dtype)
    reach = sum((n - 1) * s for n, s in zip(lazy.shape, lazy.stride, strict=True))
    sound = min((lazy.offset, *lazy.shape, *lazy.stride)) >= 0
    size = math.prod(lazy.shape)
    if not sound or (size and lazy.offset + reach >= len(values)) or size > len(values):
        raise EOFError(f"tensor of shape {lazy.shape} reaches beyond its storage")
    strides = [s * lazy.dtype.itemsize for s in lazy.stride]
    return np.lib.stride_tricks.as_strided(values[lazy.offset :], lazy.shape, strides).copy()
