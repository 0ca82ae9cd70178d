"""Weight files of every kind that is read, told by their content.

torch_files    torch.save's two formats, TorchScript; whatever else they hold is not run
flax_files     .msgpack of flax.serialization, .npz with names as "a/b/c"
safetensors    by its own library, in all float formats; also the index of several shards
foreign        the kinds that are not read, each with what to do
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import ml_dtypes
import numpy as np
import safetensors
from etils import epath

from prism_jax.data.weight_files import flax_files, foreign, torch_files
from prism_jax.data.weight_files.contents import Contents
from prism_jax.errors import UserError

__all__ = ["Contents", "hash_in_name", "other_hash", "parts", "read"]

T = TypeVar("T")

_INDEX = ".index.json"  # of shards: {"weight_map": {tensor: file}}
_SAVE = "save only the state dict: torch.save(model.state_dict(), path)"
_SAFETENSORS = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def read(path: str) -> Contents:
    """Read the tensors of a weight file.

    Raises:
      UserError: no such file; damaged, or of a kind that is not read, which is named.
    """
    file = epath.Path(path)
    if not file.is_file():
        known = foreign.recognise_absent(file)
        raise UserError(
            f"{path}: {known}"
            if known
            else f"there is no weight file {path}; give the path of a .pth or .safetensors"
        )
    data = file.read_bytes()
    run = functools.partial(_explaining, path, data)
    if file.name.endswith(_INDEX):
        contents = run(lambda: _merge([_read(f.name, f.read_bytes()) for f in _shards(file)]))
    else:
        contents = run(lambda: _read(file.name, data))
    if not contents.tensors:
        named = ", ".join(contents.skipped[:5])
        named = f": it names {named}, of which nothing was run" if named else ""
        raise UserError(f"{path} holds no tensors{named}. Where the network is, {_SAVE}")
    return contents._replace(array=lambda tensor: run(lambda: contents.array(tensor)))


def _explaining(path: str, data: bytes, reads: Callable[[], T]) -> T:
    """Run something that reads a file, whose errors become messages that name it."""
    try:
        return reads()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (
        *(AttributeError, EOFError, IndexError, KeyError, OverflowError, RecursionError),
        *(TypeError, ValueError, struct.error, pickle.UnpicklingError, MemoryError),
        *(zipfile.BadZipFile, zlib.error, NotImplementedError, safetensors.SafetensorError),
    ) as error:
        other = other_hash(epath.Path(path).name, hashlib.sha256(data).hexdigest())
        other = f" It may not be the file that was published: {other}." if other else ""
        raise UserError(
            f"{path} cannot be read as a weight file; it is truncated, damaged or of another "
            f"kind ({type(error).__name__}: {error}).{other} Fetch it again, or {_SAVE}"
        ) from error


def parts(path: epath.PathLike) -> list[epath.Path]:
    """The files that are read for one: it, and where it is an index, the shards that it names."""
    file = epath.Path(path)
    return [file, *(_shards(file) if file.name.endswith(_INDEX) else ())]


def hash_in_name(name: str) -> str | None:
    """The digits in a file's name that may be the beginning of its SHA-256 (torch.hub's rule).

    In ``resnet18-f37072fd.pth`` they are; in another name they may be a date.
    """
    found = re.search(r"-([0-9a-f]{8,64})\.[^-]*$", name)
    return found and found[1]


def other_hash(name: str, sha256: str) -> str | None:
    """Say that the digits in a file's name are not its hash; None: they are, or there are none."""
    digits = hash_in_name(name)
    if digits is None or sha256.startswith(digits):
        return None
    return f"{digits} in its name is not the beginning of its SHA-256, {sha256[:16]}..."


def _read(name: str, data: bytes) -> Contents:
    """Read one file by its content."""
    header = int.from_bytes(data[:8], "little")
    if data[8:9] == b"{" and header < 2**27:
        return _read_safetensors(data)
    if data[:2] == b"PK":
        return _read_zip(data)
    if torch_files.is_legacy(data):
        return torch_files.read_legacy(data)
    if known := foreign.recognise(name, data):
        raise UserError(known)
    if name.endswith(".msgpack") or 0x81 <= data[0] <= 0x8F or data[0] in (0xDE, 0xDF):
        return flax_files.read_msgpack(data)
    contents = torch_files.read_pickle(data)
    arrays = {"/".join(path): tensor for path, tensor in contents.tensors.items()}
    if flax_files.is_flax(names[-1] for names in contents.tensors):
        return contents._replace(tensors=flax_files.tensors_of(arrays), flax=True)
    return contents


def _read_zip(data: bytes) -> Contents:
    # The archive stays open: tensors are read out of it when they are asked for.
    archive = zipfile.ZipFile(io.BytesIO(data))
    names = archive.namelist()
    if known := foreign.recognise_zip(names):
        raise UserError(known)
    if any(name.endswith(".npy") for name in names):
        return flax_files.read_npz(data)
    return torch_files.read_zip(archive)


def _read_safetensors(data: bytes) -> Contents:
    arrays = {}
    for name, entry in safetensors.deserialize(data):
        if entry["dtype"] not in _SAFETENSORS:
            raise UserError(
                f"{name} is of the format {entry['dtype']}; read are {', '.join(_SAFETENSORS)}. "
                "Save the network in one of them"
            )
        values = np.frombuffer(entry["data"], _SAFETENSORS[entry["dtype"]])
        arrays[name] = values.reshape(entry["shape"])
    if flax_files.is_flax(arrays):
        return Contents("safetensors weights", flax_files.tensors_of(arrays), flax=True)
    tensors: dict[tuple[str, ...], Any] = {(name,): array for name, array in arrays.items()}
    return Contents("safetensors weights", tensors)


def _shards(index: epath.Path) -> list[epath.Path]:
    """The files that an index of shards names."""
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f'{index} is no index of shards, which has a "weight_map" ({error})'
        ) from error
    for name in names:
        if not isinstance(name, str) or name != epath.Path(name).name:
            raise UserError(f"{index} names {name!r}, which is not a file beside it")
        if not (index.parent / name).is_file():
            raise UserError(f"{index} names {name}, which is not beside it; fetch all its shards")
    return [index.parent / name for name in names]


def _merge(shards: list[Contents]) -> Contents:
    """Several files' tensors as one's."""
    tensors = {path: tensor for shard in shards for path, tensor in shard.tensors.items()}
    makers = {id(t): shard.array for shard in shards for t in shard.tensors.values()}
    return Contents(f"{len(shards)} shards", tensors, lambda tensor: makers[id(tensor)](tensor))
