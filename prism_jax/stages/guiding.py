"""A CLIP that guides recover: what its text encoder says of the classes, kept by squeeze.

squeeze/clip/
    prompts/      the embedding of each class's text
    record.json   written last: done

The image encoder is read from its directory whenever recover runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from prism_jax import synthesis
from prism_jax.config.generation import CLIP_FOLDER
from prism_jax.data import workdir
from prism_jax.data.weights import RECORD
from prism_jax.diffusion import clip, huggingface, prompts
from prism_jax.errors import UserError
from prism_jax.stages import fingerprints
from prism_jax.stages.context import Context
from prism_jax.stages.squeeze import refusal

PARTS = ("image_encoder", "text_encoder")


def wanted(context: Context) -> bool:
    """Whether recover is guided."""
    return context.config.recover.clip > 0


def folder(context: Context) -> epath.Path:
    return context.root / "squeeze" / CLIP_FOLDER


def is_done(context: Context) -> bool:
    """Whether the classes' texts are there.

    Raises:
      UserError: they are, but of another encoder, another template or other classes.
    """
    root = folder(context)
    found = workdir.read_fingerprint(root)
    if found is None:
        return False
    if lines := workdir.differences(found, fingerprints.clip_texts(context)):
        raise UserError(refusal("what CLIP says of the classes", root, lines))
    return (root / RECORD).exists()


def missing(context: Context) -> list[str]:
    """What it is read from and is not there, a line each."""
    directory = _directory(context)
    found = [line for part in PARTS for line in _absent(directory, part)]
    looks: list[Callable[[], Any]] = [lambda: context.inputs.spoken_names]
    if not (folder(context) / RECORD).exists():
        looks.append(lambda: prompts.tokenizer_folder(directory))
    for look in looks:
        try:
            look()
        except UserError as error:
            found.append(str(error))
    return found


def _absent(directory: str, part: str) -> list[str]:
    try:
        huggingface.check_there(directory, part)
    except UserError as error:
        return [str(error)]
    return []


def check(context: Context) -> None:
    """Refuse, before any work, encoders that are not there or do not belong together.

    Raises:
      UserError: such a directory, images that it cannot read, texts that cannot be encoded.
    """
    if lines := missing(context):
        raise UserError("CLIP cannot be read: " + "; ".join(lines))
    directory = _directory(context)
    forms: list[Any] = [huggingface.form(directory, part) for part in PARTS]
    images, texts = forms
    if images.projection != texts.projection:
        raise UserError(
            f"the encoders in {directory} do not belong together: embeddings of images have "
            f"{images.projection} numbers, those of texts {texts.projection or 'no projection'}. "
            f"Download {huggingface.PARTS['image_encoder'].source}, which has both"
        )
    channels = context.inputs.image_shape[2]
    if channels not in (1, images.channels):
        raise UserError(
            f"{context.config.dataset.name} has images of {channels} channels, and the CLIP in "
            f"{directory} reads {images.channels}; unset recover.clip"
        )
    offered = context.offers(f"squeeze/{CLIP_FOLDER}", fingerprints.clip_texts(context))
    if not (is_done(context) or offered):
        for part in PARTS:
            huggingface.load(directory, part)
        prompts.tokenise(directory, _said(context), texts)


def run(context: Context) -> None:
    """Encode the classes' texts; one process' work."""
    root = folder(context)

    def prepare() -> None:
        context.work.begin(root, fingerprints.clip_texts(context))

    def left() -> list[str]:
        return [] if is_done(context) else [CLIP_FOLDER]

    if context.work.deal(CLIP_FOLDER, [CLIP_FOLDER], left, prepare):
        started = time.monotonic()
        texts_KD = _texts(context)
        record = {"shape": list(texts_KD.shape), "seconds": time.monotonic() - started}
        workdir.write_record(root / RECORD, record)
    context.work.wait(lambda: is_done(context))


def open_(context: Context) -> synthesis.Guide | None:
    """What guides recover; None where nothing does.

    Raises:
      UserError: its texts are not there.
    """
    if not wanted(context):
        return None
    if not is_done(context):
        raise UserError(
            f"there is nothing that CLIP says of the classes in {folder(context)}; run the squeeze "
            f"stage first (--stages=squeeze,...)"
        )
    loaded = huggingface.load(_directory(context), "image_encoder")
    return _guide(context, loaded.module, loaded.params, _texts(context))


def described(context: Context) -> synthesis.Guide | None:
    """The same of shapes alone: the directory's form, or ViT-B/32's where there is none yet."""
    if not wanted(context):
        return None
    part = "image_encoder"
    encoder: Any = huggingface.planned(_directory(context), part)
    texts: Any = jax.ShapeDtypeStruct(
        (context.config.dataset.num_classes, encoder.projection), np.float32
    )
    return _guide(context, encoder, huggingface.shapes(part, encoder), texts)


def _guide(context: Context, encoder: Any, params: Any, texts_KD: Any) -> synthesis.Guide:
    dtype = jnp.dtype(context.config.recover.dtype)
    return synthesis.Guide(params, texts_KD, encoder.clone(dtype=dtype), clip.NORMALISATION)


def _texts(context: Context) -> np.ndarray:
    return prompts.embeddings(folder(context) / "prompts", _directory(context), _said(context))


def _said(context: Context) -> list[str]:
    template = context.config.recover.clip_template
    return prompts.of_classes(context.inputs.spoken_names, template)


def _directory(context: Context) -> str:
    directory = context.config.recover.clip_directory
    assert directory is not None  # config.rules
    return directory
