"""Files that hold no weights that are read here, told by how they begin, with what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from etils import epath

_TABLE_END = bytes.fromhex("57fb808b247547db")  # of LevelDB, which TensorFlow's checkpoints use
_CONVERT = "load it there and save its arrays under our names as .safetensors or .npz"


class Kind(NamedTuple):
    """A kind of file: what it is, what to do, and how it is told from its name and bytes."""

    what: str
    remedy: str
    told: Callable[[str, bytes], bool]


def _begins(*magic: bytes, at: int = 0) -> Callable[[str, bytes], bool]:
    return lambda name, data: data[at : at + len(magic[0])] in magic


def _named(*endings: str) -> Callable[[str, bytes], bool]:
    return lambda name, data: name.lower().endswith(endings)


def _onnx(name: str, data: bytes) -> bool:
    # A protobuf: the version of its format, then who made it, or the graph.
    return name.endswith(".onnx") or (data[:1] == b"\x08" and data[2:3] in (b"\x12", b"\x3a"))


KINDS = (
    Kind("empty", "fetch it again", lambda name, data: not data),
    Kind(
        "a Git LFS pointer, not the file itself",
        "run `git lfs pull` where it is from",
        _begins(b"version https://git-lfs"),
    ),
    Kind(
        "a web page",
        "the download gave a page (a login, an error) in place of the file; fetch it again",
        lambda name, data: (
            data[:256].lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml"))
        ),
    ),
    Kind(
        "a Keras or HDF5 file",
        f"{_CONVERT}, or take the network's PyTorch weights",
        _begins(b"\x89HDF\r\n\x1a\n"),
    ),
    Kind("a GGUF file, of quantised language models", "take the float weights", _begins(b"GGUF")),
    Kind("a TensorFlow Lite model", "take the weights it was made from", _begins(b"TFL3", at=4)),
    Kind(
        "a TensorFlow checkpoint",
        f"{_CONVERT}, or take the network's PyTorch weights",
        lambda name, data: (
            data.endswith(_TABLE_END)
            or data.startswith(b"model_checkpoint_path:")
            or ".ckpt.data-" in name
            or name.endswith((".data-00000-of-00001", ".ckpt.meta"))
        ),
    ),
    Kind(
        "a TensorFlow SavedModel",
        f"{_CONVERT}, or take the network's PyTorch weights",
        _named("saved_model.pb"),
    ),
    Kind("an ONNX graph", "take the weights it was exported from (.pth, .safetensors)", _onnx),
    Kind("a single NumPy array", "a network is many: np.savez", _begins(b"\x93NUMPY")),
    Kind("compressed (gzip)", "unpack it first: gunzip, tar -xzf", _begins(b"\x1f\x8b")),
    Kind("compressed (bzip2)", "unpack it first: bunzip2, tar -xjf", _begins(b"BZh")),
    Kind("compressed (xz)", "unpack it first: unxz, tar -xJf", _begins(b"\xfd7zXZ\x00")),
    Kind("compressed (zstd)", "unpack it first: unzstd", _begins(b"\x28\xb5\x2f\xfd")),
    Kind("compressed (7z)", "unpack it first", _begins(b"7z\xbc\xaf\x27\x1c")),
    Kind("a tar archive", "unpack it first: tar -xf", _begins(b"ustar", at=257)),
    Kind("an image", "name the weight file", _begins(b"\x89PNG", b"\xff\xd8\xff\xe0")),
)


def recognise(name: str, data: bytes) -> str | None:
    """What a file is that is not read, and what to do; None: it is none of these."""
    found = next((kind for kind in KINDS if kind.told(name, data)), None)
    return found and f"it is {found.what}, not read here: {found.remedy}"


def recognise_zip(names: list[str]) -> str | None:
    """The same for a zip archive, by the names of its members."""
    if any(name.endswith(".weights.h5") for name in names):
        return f"it is a Keras file, not read here: {_CONVERT}, or take its PyTorch weights"
    inside = [name for name in names if name.endswith((".pth", ".pt", ".th", ".safetensors"))]
    if inside:
        return f"it is a zip archive with {inside[0]} in it: unpack it first (unzip)"
    return None


def recognise_absent(file: epath.Path) -> str | None:
    """The same for a path at which nothing is, beside which its parts may be."""
    if (file.parent / f"{file.name}.index").is_file():
        return recognise("", _TABLE_END)
    return None


def recognise_folder(folder: epath.Path) -> str | None:
    """The same for a folder."""
    for name in ("saved_model.pb", "checkpoint"):
        if (folder / name).is_file():
            return recognise(name, (folder / name).read_bytes()[:64])
    return None
