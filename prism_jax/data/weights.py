"""Weights, wherever they are: PyTorch's files, our own teachers, Orbax checkpoints.

    resnet18-f37072fd.pth, x.safetensors    and other files: see weight_files
    squeeze/<teacher>/, import --out=DIR    weights.safetensors and record.json
    .../checkpoints/, .../checkpoints/500/  Orbax, of a training of ours
    any other folder of Orbax               a tree with "params" and "batch_stats"

Nothing in them is ever run, and nothing is written.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from flax import traverse_util
from safetensors import numpy as safetensors

from prism_jax import progress
from prism_jax.data import weight_files, workdir
from prism_jax.data.checkpoints import read_newest
from prism_jax.data.datasets import DATASETS
from prism_jax.data.weight_files import foreign
from prism_jax.errors import UserError
from prism_jax.models import build, import_torch, lookup
from prism_jax.models.fitting import compare, fit, guess_architecture, lacks_head
from prism_jax.models.layouts import rename
from prism_jax.models.registry import check_image_size
from prism_jax.models.selection import select
from prism_jax.types import Normalisation, PyTree

WEIGHTS = "weights.safetensors"
RECORD = "record.json"
FILES = (".pth", ".pt", ".th", ".ckpt", ".bin", ".safetensors", ".msgpack", ".npz", ".index.json")
STATED = ("architecture", "width", "depth", "stem")  # what a record says of a network's form

# Names of networks that differ in what no tensor shows, and what to say of them.
_UNSEEN = {
    "tf_": "named as TensorFlow's networks, which pad more on the right and below, and whose "
    "BatchNorm has an epsilon of 0.001: tensors show neither, and ours has neither. Evaluate it",
    "resnet(aa|blur)": "named as networks that blur before they take every second pixel, which "
    "tensors do not show and ours does not do. Evaluate it",
}


class Found(NamedTuple):
    """Weights that were read, but not yet fitted to a network.

    Attributes:
      tensors: by our names, in PyTorch's layout.
      kind: what they were, in words.
      stated: of ``STATED``, what a record says.
      sha256: of the file; of a folder's files.
      notes: a line each, what a person should know of how they were read.
      suspicion: what to add where they do not fit.
    """

    tensors: dict[str, np.ndarray]
    kind: str
    stated: dict[str, Any]
    sha256: str
    notes: tuple[str, ...] = ()
    suspicion: str | None = None


def load(
    path: str,
    architecture: str,
    num_classes: int,
    *,
    image_shape: tuple[int, int, int],
    width: float = 1.0,
    depth: float = 1.0,
    stem: str = "imagenet",
    key: str | None = None,
    head: PyTree | None = None,
    say: Callable[[str], None] = progress.say,
) -> PyTree:
    """Load weights as the variables of an architecture.

    Args:
      path: see the module.
      architecture, num_classes, image_shape, width, depth, stem: as for ``fitting.fit``.
      key: see ``read``.
      head: variables of this architecture, whose head is taken where the weights have none, or
        one of other classes; None: then they do not fit.
      say: is told how a file was read.

    Returns:
      Float32 NumPy arrays: "params" and "batch_stats".

    Raises:
      UserError: the weights cannot be read, or do not fit.
    """
    form: dict[str, Any] = {"width": width, "depth": depth, "stem": stem}
    asked: dict[str, Any] = {
        "architecture": architecture, "num_classes": num_classes, "image_shape": image_shape,
    }  # fmt: skip
    check_image_size(architecture, min(image_shape[:2]), stem)
    found = read(path, key=key, **asked, **form)
    for note in found.notes:
        say(f"{path}: {note}")
    known = {"architecture": architecture, **form}
    wrong = [f"{k} {v}, not {known[k]}" for k, v in found.stated.items() if v != known[k]]
    if wrong:
        raise UserError(f"{path} was made with {'; '.join(wrong)}: state what it was made with")
    tensors = found.tensors
    if head is not None:
        if absent := lacks_head(tensors, **asked, form=form):
            ours = import_torch.to_state_dict(head)
            tensors = {**tensors, **{name: ours[name] for name in absent}}
            say(f"{path}: it has no head; a new one of {num_classes} classes is drawn")
        others = compare(tensors, **asked, form=form)
        if others is not None and others.only_classes is not None:
            ours = import_torch.to_state_dict(head)
            tensors = {n: t if t.shape == ours[n].shape else ours[n] for n, t in tensors.items()}
            say(f"{path}: a new head of {num_classes} classes in place of {others.only_classes}")
    return fit(tensors, path, also=found.suspicion, **asked, **form)


def read(
    path: str,
    architecture: str,
    *,
    width: float = 1.0,
    depth: float = 1.0,
    stem: str = "imagenet",
    key: str | None = None,
    num_classes: int | None = None,
    image_shape: tuple[int, int, int] | None = None,
) -> Found:
    """Read weights; see the module for what can be read.

    Args:
      num_classes, image_shape: where known; they tell networks of a file apart.
      key: the beginning of the names of those that are meant, in a file with several networks.

    Raises:
      UserError: they cannot be read.
    """
    file = epath.Path(path)
    if file.name == WEIGHTS and (file.parent / RECORD).is_file():
        file = file.parent
    if not file.is_dir():
        row = lookup(architecture)
        module = build(
            architecture, num_classes or row.classes, width=width, depth=depth, stem=stem
        )
        shape = image_shape or (row.image_size, row.image_size, 3)
        leaves = import_torch.torch_leaves(import_torch.variable_shapes(module, shape))
        return _read_file(path, key, architecture, leaves)
    if key is not None:
        raise UserError(
            f'weights_key="{key}" chooses in a file with several networks; {path} has one. Leave '
            "it out"
        )
    if (file / WEIGHTS).is_file() and (file / RECORD).is_file():
        return _read_teacher(file)
    try:
        checkpoint = read_newest(file)
    except UserError as error:
        raise UserError(f"{error}; name one before it, if those weights will do") from error
    if checkpoint:
        step, arrays, meta = checkpoint
        averaged = meta.get("averaged", False)
        tensors = _named(arrays, averaged, architecture, width, depth, stem, path)
        return Found(tensors, f"Orbax checkpoint of step {step} of a training", {}, digest(path))
    return _read_orbax(file)


def _read_file(
    path: str, key: str | None, architecture: str, leaves: dict[str, import_torch.Leaf]
) -> Found:
    """Read the tensors of a file that are the architecture's, or come nearest."""
    contents, sha, layouts = weight_files.read(path), digest(path), lookup(architecture).weights
    try:
        selected = select(
            {keys: tensor.shape for keys, tensor in contents.tensors.items()},
            {name: leaf.torch_shape for name, leaf in leaves.items()},
            layouts,
            key,
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    tensors = {n: contents.array(contents.tensors[k]) for n, k in selected.paths.items()}
    tensors = rename(tensors, layouts)
    few = 2 * len(leaves.keys() & tensors.keys()) < len(leaves)
    if contents.flax and few and not guess_architecture(tensors):
        shown = ", ".join(list(selected.paths)[:3])
        raise UserError(
            f"{path} is a Flax tree ({contents.kind}) of modules that are not prism_jax's "
            f"{architecture}: {shown}, ... Read are trees with our modules' names "
            f"({', '.join(list(leaves)[:2])}, ...: see docs/teachers.md). Take the network's "
            "PyTorch weights, or rename the tree"
        )
    notes = [selected.note] if selected.note else []
    if contents.skipped:
        named = ", ".join(contents.skipped[:4]) + (", ..." if len(contents.skipped) > 4 else "")
        notes.append(f"beside the weights it names {named}; nothing of that was run")
    name = epath.Path(path).name
    notes += [note for sign, note in _UNSEEN.items() if re.match(sign, name)]
    suspicion = weight_files.other_hash(name, sha)
    if suspicion:
        notes.append(f"{suspicion} (if it is a date, this is as it should be)")
    elif digits := weight_files.hash_in_name(name):
        notes.append(f"its SHA-256 begins with {digits}, as its name says")
    if quantised := [skipped for skipped in contents.skipped if "qtensor" in skipped]:
        suspicion = f"{quantised[0]}: its quantised tensors are not read"
    return Found(tensors, contents.kind, {}, sha, tuple(notes), suspicion)


def digest(path: epath.PathLike) -> str:
    """SHA-256 of a weight file; of a folder, of the names and contents of what is read from it.

    Of an index of shards, of its and their contents.

    Raises:
      UserError: there is nothing.
    """
    file = epath.Path(path)
    if file.is_file():
        each = [sha256(part.read_bytes()) for part in weight_files.parts(file)]
        return each[0] if len(each) == 1 else sha256("".join(each).encode())
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


def stated_normalisation(path: epath.PathLike) -> Normalisation | None:
    """How images were normalised for weights that were written here; None: nobody says it.

    Args:
      path: of weights of any kind. What is known stands beside those of squeeze, of
        ``import --out`` and of a training's checkpoints.
    """
    file = epath.Path(path)
    folder = file if file.is_dir() else file.parent
    if folder.parent.name == "checkpoints":
        folder = folder.parent
    if folder.name == "checkpoints":
        folder = folder.parent
    elif file.name != WEIGHTS and file != folder:
        return None  # a file of others that lies there too
    record = workdir.read_record(folder / RECORD) if (folder / RECORD).is_file() else {}
    made_from = workdir.read_fingerprint(folder) or {}
    network, data = made_from.get("network"), made_from.get("data") or made_from.get("test") or {}
    for stated in (record.get("normalisation"), network, data.get("normalisation")):
        if stated and stated["mean"] and stated["std"]:
            return Normalisation(tuple(stated["mean"]), tuple(stated["std"]))
    known = DATASETS.get(data.get("name", ""))
    return None if known is None else known.normalisation


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
    variables = variables_of(leaves, averaged, like)
    if variables is None:
        raise UserError(
            f"{path} is no checkpoint of a training of {architecture} with width {width}, depth "
            f"{depth} and stem {stem}; state what was trained"
        )
    return import_torch.to_state_dict(variables)


def variables_of(leaves: list[np.ndarray], averaged: bool, like: PyTree) -> PyTree | None:
    """The network among the leaves of a TrainState; None where they are of another network.

    Args:
      leaves: of a training's checkpoint.
      averaged: whether it keeps an average of the network, which then is the network.
      like: "params" and "batch_stats" of such a network.
    """
    wanted = like if averaged else [like["params"], like["batch_stats"]]
    shapes, structure = jax.tree.flatten(wanted)
    weights = leaves[-len(shapes) :] if averaged else leaves[1 : 1 + len(shapes)]
    if [x.ndim for x in weights] != [x.ndim for x in shapes]:
        return None
    found = jax.tree.unflatten(structure, weights)
    return found if averaged else {"params": found[0], "batch_stats": found[1]}


def _read_orbax(folder: epath.Path) -> Found:
    """A tree that Orbax wrote: in the folder, or in the last step of a CheckpointManager's."""
    steps = [f for f in folder.iterdir() if f.is_dir() and f.name.isdigit()]
    at = max(steps, key=lambda f: int(f.name)) if steps else folder
    for item in (at, at / "default"):
        if (item / "_METADATA").is_file():
            break
    else:
        if known := foreign.recognise_folder(folder):
            raise UserError(f"{folder}: {known}")
        inside = folder / "checkpoints"
        files = sorted(f.name for f in folder.iterdir() if f.name.endswith(FILES))
        also = f" (its training's last state is in {inside})" if inside.is_dir() else ""
        also += f" (name a file in it: {', '.join(files[-3:])})" if files else ""
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
