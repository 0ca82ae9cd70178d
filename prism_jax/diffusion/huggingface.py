"""Networks from a Hugging Face directory as people have it, without PyTorch, and nothing fetched.

    DIR/unet/          config.json, diffusion_pytorch_model[.fp16].safetensors
    DIR/vae/           the same; also a directory of its own
    DIR/text_encoder/  config.json, model[.fp16].safetensors
    DIR/transformer/   DiT; also one file in the released code's layout, .pt or .safetensors

``config.json`` decides the form. Every tensor of the files goes into the network and every
parameter of the network comes from the files, or the directory is refused.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from prism_jax.data import weight_files
from prism_jax.diffusion import autoencoder, clip, dit, noise, unet
from prism_jax.errors import UserError
from prism_jax.models import import_torch
from prism_jax.types import PyTree

Tensors = dict[str, np.ndarray]
SHOWN = 5  # names in a message


class Loaded(NamedTuple):
    """A network and its weights.

    Attributes:
      module: of ``prism_jax.diffusion``, or a view of one.
      params: float32 NumPy arrays.
    """

    module: nn.Module
    params: PyTree


class Part(NamedTuple):
    """One network of a pipeline.

    Attributes:
      classes: what its config may call itself.
      build: from the config to the module; raises UserError for another form.
      arguments: shapes of the arguments that ``module.init`` takes.
      rename: from a file's tensors to ours.
      source: what to download.
      published: the form that is taken where only the form is wanted and none is at hand.
    """

    classes: tuple[str, ...]
    build: Callable[[dict[str, Any]], nn.Module]
    arguments: Callable[[nn.Module], tuple[jax.ShapeDtypeStruct, ...]]
    rename: Callable[[Tensors], Tensors]
    source: str
    published: Callable[[], nn.Module]


def lay_out(tensors: Tensors, like: PyTree, source: str, what: str) -> PyTree:
    """Lay out tensors as a network's parameters, all of both.

    Args:
      tensors: by our names, in PyTorch's layout.
      like: shapes of the parameters.
      source, what: where the tensors are from and what they should be, for messages.

    Returns:
      Float32 NumPy arrays, nested as ``like``.

    Raises:
      UserError: a tensor is missing, left over, of another shape or not finite; all are counted,
        some named.
    """
    leaves = import_torch.torch_leaves({"params": like})
    wrong = {
        "missing": sorted(leaves.keys() - tensors.keys()),
        "not part of it": sorted(tensors.keys() - leaves.keys()),
        "of another shape": [
            f"{name} {tensors[name].shape}, not {leaf.torch_shape}"
            for name, leaf in leaves.items()
            if name in tensors and tensors[name].shape != leaf.torch_shape
        ],
        "not finite": [name for name in sorted(tensors) if not np.isfinite(tensors[name]).all()],
    }
    told = [
        f"{len(names)} tensors are {how}: "
        + "; ".join(names[:SHOWN] + ["..."] * (len(names) > SHOWN))
        for how, names in wrong.items()
        if names
    ]
    if told:
        raise UserError(
            f"the weights of {source} are not those of {what} as its config states it. "
            + ". ".join(told)
            + ". Download that part again: its config and its weights belong together"
        )
    return import_torch.from_state_dict(tensors, {"params": like}, np.dtype(np.float32))["params"]


def load(path: str, part: str) -> Loaded:
    """Load one network of a pipeline.

    Args:
      path: the pipeline's directory, the part's own, or, for a DiT, a file in the released
        code's layout.
      part: a key of ``PARTS``.

    Raises:
      UserError: it is not there, damaged, or another network.
    """
    file = epath.Path(path)
    if part == "transformer" and file.is_file():
        tensors = dit.without_position_table(_read(file))
        released = dit.from_released(tensors)
        return Loaded(released, lay_out(tensors, _shapes(part, released, path), path, part))
    folder = _folder(file, part)
    module = _built(folder, part)
    try:
        tensors = PARTS[part].rename(_tensors(folder))
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    return Loaded(module, lay_out(tensors, _shapes(part, module, folder), str(folder), part))


def form(path: str, part: str) -> nn.Module:
    """The network that a part's config states, without its weights.

    Of a DiT in the released code's layout, which has no config, the weights are read.

    Raises:
      UserError: it is not there, damaged, or another network.
    """
    file = epath.Path(path)
    if part == "transformer" and file.is_file():
        return dit.from_released(_read(file))
    return _built(_folder(file, part), part)


def formed(path: str, part: str) -> tuple[Any, PyTree]:
    """The same, and the shapes of its parameters.

    Raises:
      UserError: as of ``form``; the entries of its config do not belong together.
    """
    module = form(path, part)
    return module, _shapes(part, module, path)


def _built(folder: epath.Path, part: str) -> nn.Module:
    config = _config(folder, part)
    try:
        return PARTS[part].build(config)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    except Exception as error:  # of a config that nobody writes
        raise UserError(
            f"{folder / CONFIG} is not the config of a {part} ({type(error).__name__}: {error}). "
            f"Download {PARTS[part].source} again"
        ) from error


def planned(path: str, part: str) -> nn.Module:
    """The same, or the published network where nothing tells its form yet."""
    file = epath.Path(path)
    told = file.is_file() or any((folder / CONFIG).is_file() for folder in (file / part, file))
    return form(path, part) if told else PARTS[part].published()


def sample_size(path: str, part: str) -> int | None:
    """The side of the latents that a denoiser was trained on; None where nothing says it."""
    file = epath.Path(path)
    if file.is_file():
        return dit.trained_side(_read(file))
    side = _config(_folder(file, part), part).get("sample_size")
    return side if isinstance(side, int) else None


def schedule(path: str, otherwise: noise.Schedule) -> noise.Schedule:
    """The noise that a pipeline's denoiser was trained with; ``otherwise`` where it has no file.

    How its scheduler would sample is not read: which one it is, ``clip_sample`` (of latents, which
    diffusers' own pipeline of Stable Diffusion overrules where it is true).

    Raises:
      UserError: it says what is not implemented, or not what noise there was.
    """
    file = epath.Path(path) / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        return otherwise
    try:
        config = json.loads(file.read_text())
        found = {ours: config[theirs] for theirs, ours in SCHEDULER.items() if theirs in config}
        trained = config.get("num_train_timesteps", noise.TRAINED)
        unknown = [key for key in OTHER_NOISE if config.get(key)]
        spacing = config.get("timestep_spacing") or "leading"
        absent = [key for key in BETAS if config.get(key) is None]
        name = config.get("_class_name") or "scheduler"
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{file} is damaged ({error}); download it again") from None
    if found.get("prediction") == "v_prediction":
        found["prediction"] = "v"
    if trained != noise.TRAINED:
        raise UserError(f"{file}: its denoiser was trained with other than {noise.TRAINED} steps")
    if unknown:
        raise UserError(
            f"{file}: {unknown[0]} is {config[unknown[0]]!r}, and noise of that kind is not "
            f"implemented; choose a denoiser that was trained without"
        )
    if absent:
        raise UserError(
            f"{file}, of a {name}, states no {' and no '.join(absent)}, so that it does not tell "
            f"the noise that its denoiser was trained with. Only betas are implemented: download "
            f"scheduler/ of the repository that the denoiser is from, as Stable Diffusion 1 and 2 "
            f"and DiT have it"
        )
    if otherwise.spacing != "leading":  # what follows is of the spacing of Stable Diffusion's
        found = {key: found[key] for key in found.keys() - {"offset", "ends_clean"}}
    elif spacing in tuple(SPACED):
        found["spacing"] = SPACED[spacing]
    else:
        raise UserError(
            f"{file}: timestep_spacing is {spacing!r}; allowed: {', '.join(SPACED)}. State "
            f"the one that the images are to be sampled with"
        )
    first, last = found["first"], found["last"]
    if not (_is(first, int, float) and _is(last, int, float) and 0 < first <= last < 1):
        raise UserError(
            f"{file}: beta_start is {first!r} and beta_end is {last!r}; they are numbers above 0 "
            f"and below 1, the second not the smaller one. Download it again"
        )
    for theirs, kind, what in (
        ("steps_offset", int, "a whole number"),
        ("set_alpha_to_one", bool, "true or false"),
    ):
        if not _is(found.get(SCHEDULER[theirs], kind()), kind):
            raise UserError(
                f"{file}: {theirs} is {config[theirs]!r}; it is {what}. Download it again"
            )
    try:
        noise.check(dataclasses.replace(otherwise, **found), 1)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return dataclasses.replace(otherwise, **found)


def _is(value: Any, *kinds: type) -> bool:
    """Whether a value of JSON is of one of these types; true and false are no numbers."""
    return type(value) in kinds


def check_there(path: str, part: str) -> None:
    """Find a part's files, without reading them.

    Raises:
      UserError: they are not there; it says what to download and where it goes.
    """
    file = epath.Path(path)
    if part != "transformer" or not file.is_file():
        _files(_folder(file, part))


def digest(path: str, part: str) -> str:
    """SHA-256 of what :func:`load` reads.

    Raises:
      UserError: it is not there.
    """
    file = epath.Path(path)
    if part == "transformer" and file.is_file():
        return hashlib.sha256(file.read_bytes()).hexdigest()
    folder = _folder(file, part)
    found = hashlib.sha256()
    for file in (folder / CONFIG, *_files(folder)):
        found.update(hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()


@functools.lru_cache(maxsize=8)  # seconds of a published U-Net; a run asks for it many times
def shapes(part: str, module: nn.Module) -> PyTree:
    """The shapes of a network's parameters, to be read only.

    Raises:
      UserError: the entries of its config do not belong together.
    """
    key = jax.random.key(0, impl="threefry2x32")
    try:
        return jax.eval_shape(module.init, key, *PARTS[part].arguments(module))["params"]
    except UserError:
        raise
    except Exception as error:  # flax raises several kinds
        raise UserError(
            f"no {part} can be built of what its config states ({type(error).__name__}: {error}). "
            f"Download {PARTS[part].source} again"
        ) from error


def _shapes(part: str, module: nn.Module, where: epath.PathLike) -> PyTree:
    try:
        return shapes(part, module)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _folder(path: epath.Path, part: str) -> epath.Path:
    """The part's own directory: with a config.json in it."""
    if path.is_file():
        raise UserError(
            f"{path} is one file; a {part} is read from a directory, as diffusers and transformers "
            f"write it. Download {PARTS[part].source}"
        )
    for folder in (path / part, path):
        if (folder / CONFIG).is_file():
            return folder
    if part == "transformer" and path.suffix in SUFFIXES and not path.exists():
        raise UserError(
            f"there is no file {path}; name a DiT's file in the released code's layout, or unset "
            f"it and download {PARTS[part].source}"
        )
    raise UserError(
        f"there is no {part} at {path}: neither {path / part / CONFIG} nor {path / CONFIG}. "
        f"Download {PARTS[part].source} into {path / part}"
    )


def _config(folder: epath.Path, part: str) -> dict[str, Any]:
    """The part's config.json, seen to be that of the right class."""
    row = PARTS[part]
    try:
        config = json.loads((folder / CONFIG).read_text())
        found = config.get("_class_name") or config["architectures"][0]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder / CONFIG} cannot be read as the config of a {part} "
            f"({type(error).__name__}: {error}). Download {row.source} again"
        ) from None
    if found not in row.classes:
        raise UserError(
            f"{folder} holds a {found}; a {part} is a {' or '.join(row.classes)}. Download "
            f"{row.source} into {folder}"
        )
    return config


def _files(folder: epath.Path) -> list[epath.Path]:
    """The files that hold a part's weights, in whatever form they were saved."""
    for suffix, stems in STEMS.items():
        for variant in VARIANTS:
            for stem in stems:
                name = f"{stem}{variant}{suffix}"
                if (folder / name).is_file():
                    return [folder / name]
                for index in (f"{name}.index.json", f"{stem}{suffix}.index{variant}.json"):
                    if (folder / index).is_file():
                        return _shards(folder, index)
    names = ", ".join(f"{stem}{suffix}" for suffix, stems in STEMS.items() for stem in stems)
    raise UserError(f"{folder} has a {CONFIG} and no weights. Download one of {names} beside it")


def _shards(folder: epath.Path, index: str) -> list[epath.Path]:
    """The files that an index lists."""
    try:
        names = sorted(set(json.loads((folder / index).read_text())["weight_map"].values()))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder / index} is damaged ({type(error).__name__}: {error}); download it again"
        ) from None
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise UserError(
            f"{folder / index} lists {', '.join(missing)}, which are not there; download them "
            f"into {folder}"
        )
    return [folder / name for name in names]


def _tensors(folder: epath.Path) -> Tensors:
    found: Tensors = {}
    for file in _files(folder):
        found |= _read(file)
    return found


def _read(file: epath.Path) -> Tensors:
    """The tensors of one file; of one that a training saved, those of its average."""
    contents = weight_files.read(str(file))
    named = {keys: contents.array(tensor) for keys, tensor in contents.tensors.items()}
    for wrapper in WRAPPERS:
        if inner := {
            keys[1:]: t for keys, t in named.items() if len(keys) > 1 and keys[0] == wrapper
        }:
            named = inner
    return {".".join(keys): named[keys] for keys in sorted(named)}


CONFIG = "config.json"
# Of a scheduler's config, and of our schedule.
SCHEDULER = {
    "beta_schedule": "name",
    "beta_start": "first",
    "beta_end": "last",
    "steps_offset": "offset",
    "set_alpha_to_one": "ends_clean",
    "prediction_type": "prediction",
}
BETAS = ("beta_schedule", "beta_start", "beta_end")  # without these there is another noise
OTHER_NOISE = ("trained_betas", "rescale_betas_zero_snr", "use_flow_sigmas")
# Of ``timestep_spacing``, and of ours.
SPACED = {"leading": "leading", "trailing": "trailing", "linspace": "even"}
# The first that is there is read: one without pickles, of full precision.
STEMS = {
    ".safetensors": ("diffusion_pytorch_model", "model"),
    ".bin": ("diffusion_pytorch_model", "pytorch_model"),
}
SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")  # of a file by itself
VARIANTS = ("", ".fp16", ".bf16")
WRAPPERS = ("ema", "state_dict", "model")  # around a network in a file, the first before others


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _integers(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


PARTS = {
    "unet": Part(
        ("UNet2DConditionModel",),
        unet.from_config,
        lambda m: (
            _floats(1, 2 ** len(m.widths), 2 ** len(m.widths), m.channels),
            _floats(1),
            _floats(1, 1, m.context),
        ),
        dict,
        "unet/ of a Stable Diffusion 1 or 2 repository",
        unet.UNet2DCondition,
    ),
    "vae": Part(
        ("AutoencoderKL",),
        autoencoder.from_config,
        lambda m: (_floats(1, 2 ** len(m.widths), 2 ** len(m.widths), m.channels),),
        autoencoder.rename,
        "vae/ of a Stable Diffusion repository, or stabilityai/sd-vae-ft-mse",
        autoencoder.AutoencoderKL,
    ),
    "text_encoder": Part(
        ("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPModel"),
        clip.text_from_config,
        lambda m: (_integers(1, m.length),),
        clip.rename_text,
        "text_encoder/ of a Stable Diffusion 1 or 2 repository, or openai/clip-vit-base-patch32",
        clip.TextEncoder,
    ),
    "image_encoder": Part(
        ("CLIPVisionModelWithProjection", "CLIPModel"),
        clip.image_from_config,
        lambda m: (_floats(1, m.size, m.size, m.channels),),
        clip.rename_image,
        "openai/clip-vit-base-patch32",
        clip.ImageEncoder,
    ),
    "transformer": Part(
        ("DiTTransformer2DModel", "Transformer2DModel"),
        dit.from_config,
        lambda m: (_floats(1, m.patch, m.patch, m.channels), _floats(1), _integers(1)),
        dit.rename_diffusers,
        "transformer/ of facebook/DiT-XL-2-256",
        dit.DiT,
    ),
}
