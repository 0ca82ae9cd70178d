"""PyTorch weight files into flax variables, without PyTorch and without running what they say.

Module names are PyTorch's, so a tensor's name is the path of its leaf, joined with dots, and
one table of leaves serves every architecture. Files that name their tensors otherwise have a row
in ``LAYOUTS``.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from prism_jax.errors import UserError
from prism_jax.models.registry import ARCHITECTURES, build, lookup
from prism_jax.types import PyTree

LEAVES = {
    ("params", "kernel"): "weight",
    ("params", "scale"): "weight",
    ("batch_stats", "mean"): "running_mean",
    ("batch_stats", "var"): "running_var",
}
# Counters, and index tables that the code computes.
UNUSED = re.compile(r"(^|\.)(num_batches_tracked|relative_position_index|attn_mask)$")
WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
# Pattern and replacement, tried in order on every tensor's name.
LAYOUTS: dict[str, tuple[tuple[str, str], ...]] = {
    "torchvision": (),
    "timm": (),
    "cifar": (),
    "condensation": (),
    "densenet_2017": ((r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2."),),
    "swin_2021": (
        (r"^patch_embed\.proj\.", "features.0.0."),
        (r"^patch_embed\.norm\.", "features.0.2."),
        *((rf"^layers\.{i}\.blocks\.", f"features.{2 * i + 1}.") for i in range(4)),
        *((rf"^layers\.{i}\.downsample\.", f"features.{2 * i + 2}.") for i in range(3)),
        (r"\.mlp\.fc1\.", ".mlp.0."),
        (r"\.mlp\.fc2\.", ".mlp.3."),
    ),
    "convnext_2022": (
        *((rf"^downsample_layers\.{i}\.", f"features.{2 * i}.") for i in range(4)),
        *((rf"^stages\.{i}\.", f"features.{2 * i + 1}.") for i in range(4)),
        (r"\.dwconv\.", ".block.0."),
        (r"\.norm\.", ".block.2."),
        (r"\.pwconv1\.", ".block.3."),
        (r"\.pwconv2\.", ".block.5."),
        (r"\.gamma$", ".layer_scale"),
        (r"^norm\.", "classifier.0."),
        (r"^head\.", "classifier.2."),
    ),
}


class Leaf(NamedTuple):
    """Where one tensor goes: its path from the collection on, its shapes here and in PyTorch."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    torch_shape: tuple[int, ...]


def load_checkpoint(
    path: str,
    architecture: str,
    num_classes: int,
    *,
    image_shape: tuple[int, int, int],
    width: float = 1.0,
    depth: float = 1.0,
    stem: str = "imagenet",
) -> PyTree:
    """Load a PyTorch or safetensors file as the variables of an architecture.

    Args:
      path: ``.pth`` (also ``.pt``, ``.th``; either format of ``torch.save``) or
        ``.safetensors``. A hash in its name, as in ``resnet18-f37072fd.pth``, is checked.
      architecture: a key of ``ARCHITECTURES``.
      num_classes, width, depth, stem: as for ``build``.
      image_shape: (height, width, channels) of the images it will read.

    Returns:
      Float32 NumPy arrays: "params" and, with BatchNorm, "batch_stats".

    Raises:
      UserError: the file is missing, damaged, not the one its name promises, holds more than
        tensors, or does not fit; everything that does not fit is told at once.
    """
    row = lookup(architecture)
    tensors = rename(read_checkpoint(path), row.weights)
    module = build(architecture, num_classes, width=width, depth=depth, stem=stem)
    shapes = _shapes(module, image_shape)
    leaves = torch_leaves(shapes)
    missing = sorted(leaves.keys() - tensors.keys())
    unused = sorted(tensors.keys() - leaves.keys())
    misshapen = [
        f"{name}: file {tensors[name].shape}, network {leaf.torch_shape}"
        for name, leaf in leaves.items()
        if name in tensors and tensors[name].shape != leaf.torch_shape
    ]
    if missing or unused or misshapen:
        raise UserError(_misfit(path, architecture, tensors, missing, unused, misshapen))
    return from_state_dict(tensors, shapes, np.float32)


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


def rename(tensors: dict[str, np.ndarray], layouts: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Give a file's tensors our names and drop what no network needs.

    Args:
      tensors: by the file's names; a ``module.`` in front is cut off.
      layouts: keys of ``LAYOUTS``.
    """
    rules = [(re.compile(old), new) for layout in layouts for old, new in LAYOUTS[layout]]
    renamed = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("module.")
        if UNUSED.search(name):
            continue
        for pattern, replacement in rules:
            name = pattern.sub(replacement, name)
        renamed[name] = tensor.reshape(-1, 1, 1) if name.endswith("layer_scale") else tensor
    return renamed


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


def _shapes(module, image_shape: tuple[int, int, int]) -> PyTree:
    images_BHWC = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return jax.eval_shape(module.init, jax.random.key(0, impl="threefry2x32"), images_BHWC)


def _misfit(path, architecture, tensors, missing, unused, misshapen) -> str:
    """Tell everything that does not fit, and what the file looks like instead."""
    lines = [f"{path} does not fit {architecture}:"]
    for what, names in (
        ("missing from the file", missing),
        ("in the file, but not in the network", unused),
        ("of another shape", misshapen),
    ):
        if names:
            shown = "; ".join(names[:5]) + ("; ..." if len(names) > 5 else "")
            lines.append(f"  {len(names)} tensors {what}: {shown}")
    if not missing and not unused and len(misshapen) <= 2:
        lines.append("  Only the ends differ: state the file's number of classes and channels.")
    likely = guess_architecture(tensors)
    if likely and architecture not in likely:
        lines.append(f"  It looks like {' or '.join(likely)}: state that architecture.")
    else:
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
        leaves = torch_leaves(_shapes(build(name, row.classes), images))
        shapes = {
            n for n, leaf in leaves.items() if n in ours and ours[n].shape != leaf.torch_shape
        }
        if leaves.keys() == ours.keys() and len(shapes) <= 2:
            likely.append(name)
    return likely


def read_checkpoint(path: str) -> dict[str, np.ndarray]:
    """Read the tensors of a weight file.

    Args:
      path: see :func:`load_checkpoint`.

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
            found: Any = safetensors.numpy.load(data)
        elif data[:2] == b"PK":
            found = _read_zip(data)
        else:
            found = _read_legacy(data)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (
        *(AttributeError, EOFError, IndexError, KeyError, OverflowError, RecursionError),
        *(TypeError, ValueError, struct.error, pickle.UnpicklingError, MemoryError),
        *(zipfile.BadZipFile, NotImplementedError, safetensors.SafetensorError),
    ) as error:
        raise UserError(
            f"{path} cannot be read as a weight file; it is truncated, damaged or of another "
            f"kind ({type(error).__name__}: {error}). Fetch it again, or save the state dict anew"
        ) from error
    return _state_dict(found, path)


def _state_dict(found: Any, path: str) -> dict[str, np.ndarray]:
    """Unwrap a training checkpoint down to its tensors."""
    for _ in WRAPPERS:
        if isinstance(found, dict):
            inner = next((found[key] for key in WRAPPERS if isinstance(found.get(key), dict)), None)
            found = found if inner is None else inner
    tensors = (
        {name: value for name, value in found.items() if isinstance(value, np.ndarray)}
        if isinstance(found, dict)
        else {}
    )
    if not tensors or not all(isinstance(name, str) for name in tensors):
        raise UserError(
            f"{path} holds no state dict; save one with torch.save(model.state_dict(), path)"
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


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,  # before 0.4
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
}


class _TensorUnpickler(pickle.Unpickler):
    """An unpickler that knows tensors and ordered dicts, and refuses everything else."""

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
        return str(key), storage.dtype


def _read_zip(data: bytes) -> Any:
    """The format of ``torch.save`` since 1.6: a zip of one pickle and one file per storage."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        root = pickled.removesuffix("data.pkl")
        order = f"{root}byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise UserError("it was written by a big-endian machine; save it as .safetensors")
        found = _TensorUnpickler(io.BytesIO(archive.read(pickled))).load()
        return _resolve(found, lambda key: archive.read(f"{root}data/{key}"))


_MAGIC = 0x1950A86A20F9469CFC6C


def _read_legacy(data: bytes) -> Any:
    """The format before 1.6: four pickles, then the storages that the last of them lists."""
    stream = io.BytesIO(data)
    magic, _, system, found = (_TensorUnpickler(stream).load() for _ in range(4))
    if magic != _MAGIC:
        raise pickle.UnpicklingError("not written by torch.save")
    if not system["little_endian"]:
        raise UserError("it was written by a big-endian machine; save it as .safetensors")
    itemsize: dict[str, int] = {}
    _resolve(found, lambda key: b"", itemsize)
    storages = {}
    for key in _TensorUnpickler(stream).load():
        (count,) = struct.unpack("<q", stream.read(8))
        size = count * itemsize.get(key, 0)
        storages[key] = stream.read(size)
        if count < 0 or key not in itemsize or len(storages[key]) != size:
            raise EOFError(f"storage {key} is cut off")
    return _resolve(found, storages.__getitem__)


def _resolve(found: Any, read: Callable[[str], bytes], itemsize: dict | None = None) -> Any:
    """Replace lazy tensors by arrays, or (with ``itemsize``) only note their storages."""
    if isinstance(found, dict):
        return {key: _resolve(value, read, itemsize) for key, value in found.items()}
    if isinstance(found, (list, tuple)) and not isinstance(found, _LazyTensor):
        return [_resolve(value, read, itemsize) for value in found]
    if not isinstance(found, _LazyTensor):
        return found
    if itemsize is not None:
        itemsize[found.storage] = found.dtype.itemsize
        return found
    storage = np.frombuffer(read(found.storage), found.dtype)
    reach = sum((n - 1) * s for n, s in zip(found.shape, found.stride, strict=True))
    sound = min((found.offset, *found.shape, *found.stride)) >= 0
    if not sound or (0 not in found.shape and found.offset + reach >= len(storage)):
        raise EOFError(f"tensor of shape {found.shape} reaches beyond its storage")
    strides = [s * found.dtype.itemsize for s in found.stride]
    return np.lib.stride_tricks.as_strided(storage[found.offset :], found.shape, strides).copy()
