"""A tiny CLIP as people have it: a directory with both its encoders and a tokenizer."""

from __future__ import annotations

import importlib.util
import json
import pathlib

import pytest
import safetensors.numpy
from diffusion import parity

from prism_jax.diffusion import prompts

MERGES = [("t", "e"), ("c", "h</w>"), ("n", "ch</w>"), ("te", "nch</w>"), ("'", "s</w>")]
SIGNS = "!abcdefghijklmnopqrstuvwxyz0123456789,.'"
LENGTH = 32  # tokens of a text

needs_tokenizers = pytest.mark.skipif(
    importlib.util.find_spec("tokenizers") is None,
    reason="needs the package tokenizers, the extra `text`",
)


def vocabulary() -> dict[str, int]:
    """Every sign, in a word and at its end, then what the merges make, then the two marks."""
    words = [*SIGNS, *(f"{sign}</w>" for sign in SIGNS), *("".join(pair) for pair in MERGES)]
    words += [prompts.START, prompts.END]
    return {word: number for number, word in enumerate(words)}


def write_tokenizer(folder: pathlib.Path, padding: str | dict | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary()))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in MERGES), ""]
    (folder / "merges.txt").write_text("\n".join(lines))
    if padding:
        (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": padding}))


def read_for(
    folder: pathlib.Path, name: str, length: int, *, half: str | None = None, width: int = 16
) -> None:
    """Let the text encoder of a file read the tiny vocabulary.

    Args:
      half: the part of a whole CLIP's config that is the text encoder's.
    """
    file = folder / "config.json"
    config = json.loads(file.read_text())
    own = config[half] if half else config
    own |= {"vocab_size": len(vocabulary()), "max_position_embeddings": length}
    own["eos_token_id"] = vocabulary()[prompts.END] if half else own["eos_token_id"]
    file.write_text(json.dumps(config))
    tensors = safetensors.numpy.load_file(folder / name)
    prefix = "text_model." if half else ""
    for table, rows in (("token", len(vocabulary())), ("position", length)):
        tensor = f"{prefix}embeddings.{table}_embedding.weight"
        assert tensor in tensors, tensor
        tensors[tensor] = parity.draw(tensor, (rows, width))
    safetensors.numpy.save_file(tensors, folder / name)


def write_clip(folder: pathlib.Path) -> pathlib.Path:
    """A whole CLIP that reads images of 12 px, in the layout of openai/clip-vit-base-patch32."""
    parity.write(parity.BY_NAME["clip_whole_image"], folder)
    read_for(folder, "model.safetensors", LENGTH, half="text_config")
    write_tokenizer(folder)
    return folder
