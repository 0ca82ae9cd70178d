"""Weights, wherever they are: PyTorch's files, our own teachers, Orbax checkpoints.

    resnet18-f37072fd.pth, x.safetensors    read by models.import_torch
    squeeze/<teacher>/, import --out=DIR    weights.safetensors and record.json
    .../checkpoints/, .../checkpoints/500/  Orbax, of a training of ours
    any other folder of Orbax               a tree with "params" and "batch_stats"

Nothing in them is ever run, and nothing is written.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from flax import traverse_util
from safetensors import numpy as safetensors

from prism_jax.data import workdir
from prism_jax.data.checkpoints import read_newest
from prism_jax.errors import UserError
from prism_jax.models import build, import_torch, lookup
from prism_jax.models.layouts import rename
from prism_jax.types import PyTree

WEIGHTS = "weights.safetensors"
RECORD = "record.json"
STATED = ("architecture", "width", "depth", "stem")  # what a record says of a network's form


class Found(NamedTuple):
    """Weights that were read, but not yet fitted to a network.

    Attributes:
      tensors: by our names, in PyTorch's layout.
      kind: what they were, in words.
      stated: of ``STATED``, what a record says.
      sha256: of the file; of a folder's files.
    """

    tensors: dict[str, np.ndarray]
    kind: str
    stated: dict[str, Any]
    sha256: str


def load(
    path: str,
    architecture: str,
    num_classes: int,
    *,
    image_shape: tuple[int, int, int],
    width: float = 1.0,
    depth: float = 1.0,
    stem: str = "imagenet",
) -> PyTree:
    """Load weights as the variables of an architecture.

    Args:
      path: see the module.
      architecture, num_classes, image_shape, width, depth, stem: as for
        ``import_torch.fit``.

    Returns:
      Float32 NumPy arrays: "params" and "batch_stats".

    Raises:
      UserError: the weights cannot be read, or do not fit.
    """
    form: dict[str, Any]
    form = {"architecture": architecture, "width": width, "depth": depth, "stem": stem}
    found = read(path, **form)
    wrong = [f"{k} {v}, not {form[k]}" for k, v in found.stated.items() if v != form[k]]
    if wrong:
        raise UserError(f"{path} was made with {'; '.join(wrong)}: state what it was made with")
    return import_torch.fit(
        found.tensors, path, num_classes=num_classes, image_shape=image_shape, **form
    )


def read(
    path: str, architecture: str, *, width: float = 1.0, depth: float = 1.0, stem: str = "imagenet"
) -> Found:
    """Read weights; see the module for what can be read.

    Raises:
      UserError: they cannot be read.
    """
    row, file = lookup(architecture), epath.Path(path)
    if file.name == WEIGHTS and (file.parent / RECORD).is_file():
        file = file.parent
    if not file.is_dir():
        tensors = rename(import_torch.read_checkpoint(path), row.weights)
        kind = "safetensors weights" if file.suffix == ".safetensors" else "PyTorch weights"
        return Found(tensors, kind, {}, digest(path))
    if (file / WEIGHTS).is_file() and (file / RECORD).is_file():
        return _read_teacher(file)
    if checkpoint := read_newest(file):
        step, leaves, meta = checkpoint
        averaged = meta.get("averaged", False)
        tensors = _named(leaves, averaged, architecture, width, depth, stem, path)
        return Found(tensors, f"Orbax checkpoint of step {step} of a training", {}, digest(path))
    return _read_orbax(file)


def digest(path: epath.PathLike) -> str:
    """SHA-256 of a weight file; of a folder, of the names and contents of what is read from it.

    Raises:
      UserError: there is nothing.
    """
    file = epath.Path(path)
    if file.is_file():
        return sha256(file.read_bytes())
    if not file.is_dir():
        raise UserError(f"no checkpoint file at {path}")
    if (file / WEIGHTS).is_file():
        return sha256((file / WEIGHTS).read_bytes())
    listed = [f"{f.name} {digest(f)}\n" for f in sorted(file.iterdir(), key=lambda f: f.name)]
    return sha256("".join(listed).encode())


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def pack(tree: PyTree) -> bytes:
    """Arrays as one safetensors file: "params/conv1/kernel" and so on."""
    flat = traverse_util.flatten_dict(tree, sep="/")
    return safetensors.save({name: np.ascontiguousarray(leaf) for name, leaf in flat.items()})


def unpack(data: bytes) -> PyTree:
    """The inverse of :func:`pack`."""
    return traverse_util.unflatten_dict(safetensors.load(data), sep="/")


def unpack_variables(data: bytes) -> PyTree:
    """A network's packed variables: a group of them that is empty has left no trace."""
    return {"params": {}, "batch_stats": {}, **unpack(data)}


def _read_teacher(folder: epath.Path) -> Found:
    record, data = workdir.read_record(folder / RECORD), (folder / WEIGHTS).read_bytes()
    if sha256(data) != record["sha256"]:
        raise UserError(f"{folder / WEIGHTS} is damaged: it is not what {RECORD} describes")
    # The weights do not say the stem; what squeeze made them from does.
    made_from = (workdir.read_fingerprint(folder) or {}).get("network", {})
    stated = {**made_from, **record}
    return Found(
        import_torch.to_state_dict(unpack_variables(data)),
        f"weights written by prism_jax (from {record['source']})",
        {key: stated[key] for key in STATED if key in stated},
        record["sha256"],
    )


def _named(
    leaves: list[np.ndarray],
    averaged: bool,
    architecture: str,
    width: float,
    depth: float,
    stem: str,
    path: str,
) -> dict[str, np.ndarray]:
    """Name the leaves of a TrainState that are its network's.

    They are step, parameters, statistics, the optimiser's; then the average of statistics and
    parameters, which is the network where there is one.
    """
    row = lookup(architecture)
    module = build(architecture, row.classes, width=width, depth=depth, stem=stem)
    shape = (row.image_size, row.image_size, 3)
    like = {"batch_stats": {}, **import_torch.variable_shapes(module, shape)}
    wanted = like if averaged else [like["params"], like["batch_stats"]]
    shapes, structure = jax.tree.flatten(wanted)
    weights = leaves[-len(shapes) :] if averaged else leaves[1 : 1 + len(shapes)]
    if [x.ndim for x in weights] != [x.ndim for x in shapes]:
        raise UserError(
            f"{path} is no checkpoint of a training of {architecture} with width {width}, depth "
            f"{depth} and stem {stem}; state what was trained"
        )
    found = jax.tree.unflatten(structure, weights)
    return import_torch.to_state_dict(
        found if averaged else {"params": found[0], "batch_stats": found[1]}
    )


def _read_orbax(folder: epath.Path) -> Found:
    """A tree that Orbax wrote: in the folder, or in the last step of a CheckpointManager's."""
    steps = [f for f in folder.iterdir() if f.is_dir() and f.name.isdigit()]
    at = max(steps, key=lambda f: int(f.name)) if steps else folder
    for item in (at, at / "default"):
        if (item / "_METADATA").is_file():
            break
    else:
        inside = folder / "checkpoints"
        also = f" (its training's last state is in {inside})" if inside.is_dir() else ""
        raise UserError(
            f"{folder} holds no weights{also}: neither {WEIGHTS} with its {RECORD} (a finished "
            "squeeze/<teacher> folder, or one written by import --out), nor a whole Orbax "
            "checkpoint; give one of them, or a .pth or .safetensors file"
        )
    import orbax.checkpoint as ocp  # takes half a second

    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.restore(workdir.absolute(item))
    except Exception as error:  # Orbax raises many kinds
        raise UserError(
            f"the Orbax checkpoint {item} cannot be read ({type(error).__name__}: {error}); it is "
            "damaged, or of another kind"
        ) from error
    if not isinstance(tree, dict) or not isinstance(tree.get("params"), dict):
        raise UserError(f'the Orbax checkpoint {item} has no "params"; save a network\'s variables')
    variables = {key: tree[key] for key in ("params", "batch_stats") if tree.get(key)}
    tensors = import_torch.to_state_dict(jax.tree.map(np.asarray, variables))
    return Found(tensors, "Orbax checkpoint", {}, digest(folder))
