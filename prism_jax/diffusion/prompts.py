"""Class names to prompts, tokens and what a text encoder says, kept: a run needs no tokenizer.

FOLDER/prompts.safetensors    "texts" (K, N, D) and "null" (N, D), or "embeddings" (K, D); float32
FOLDER/record.json            the prompts, the encoder's digest
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from prism_jax.data import weights, workdir
from prism_jax.diffusion import huggingface
from prism_jax.diffusion.clip import TextEncoder
from prism_jax.errors import UserError
from prism_jax.types import Array, PyTree

TENSORS, RECORD = "prompts.safetensors", "record.json"
START, END = "<|startoftext|>", "<|endoftext|>"
PADDING = ("special_tokens_map.json", "tokenizer_config.json")  # the first that says it counts
FILES = ("vocab.json", "merges.txt", *PADDING)
OTHERS = "they are of different models. Download tokenizer/ and text_encoder/ of one repository"
BATCH = 16  # prompts that are encoded at once
# A text falls into: the special tokens, English endings, words, single digits, runs of signs.
WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


class TextCondition:
    """A :class:`~prism_jax.diffusion.protocols.Condition` whose params are the kept tensors."""

    def of_labels(self, params: PyTree, labels_B: Array) -> Array:
        return params["texts"][labels_B]

    def null(self, params: PyTree, batch: int) -> Array:
        return jnp.broadcast_to(params["null"], (batch, *params["null"].shape))


class Encoded(NamedTuple):
    """What a text encoder says of texts: float32 states (B, N, D) and embeddings (B, D')."""

    states_BND: np.ndarray
    embeddings_BD: np.ndarray


def of_classes(names: Sequence[str], template: str = "{}") -> list[str]:
    """A prompt for each class, in the order of the labels.

    Args:
      names: of the classes.
      template: with ``{}`` in the name's place.

    Raises:
      UserError: the template has no place, or a name is empty.
    """
    if template.count("{}") != 1:
        raise UserError(
            f"the prompt template {template!r} needs one {{}}, where the class's name goes"
        )
    if empty := [label for label, name in enumerate(names) if not name.strip()]:
        raise UserError(f"classes {empty[:5]} have no name to make a prompt of; name every class")
    return [template.replace("{}", name) for name in names]


def tokenise(directory: str, texts: Iterable[str], encoder: TextEncoder) -> np.ndarray:
    """Cut texts into a CLIP's tokens, between its marks of start and end, and pad them.

    Args:
      directory: a pipeline's, with ``tokenizer/``, or a CLIP's own.
      texts: what is encoded.
      encoder: what reads them: how many tokens of a text, with marks and padding, and which.

    Returns:
      (B, length) int32.

    Raises:
      UserError: the package tokenizers or the files are not there; a text is too long; the tokens
        are others than the encoder's.
    """
    length = encoder.length
    folder = tokenizer_folder(directory)
    tokenizer = _tokenizer(folder)
    start, end, pad = (tokenizer.token_to_id(token) for token in (START, END, _padding(folder)))
    if None in (start, end, pad):
        raise UserError(
            f"the vocabulary in {folder} lacks {START}, {END} or its padding token; it is no "
            "CLIP's. Download tokenizer/ again, all of it"
        )
    rows = []
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if len(ids) > length - 2:
            raise UserError(
                f"the prompt {text!r} has {len(ids)} tokens; {length - 2} fit. Shorten the class's "
                "name or the template"
            )
        rows.append([start, *ids, end, *[pad] * (length - 2 - len(ids))])
        if max(rows[-1]) >= encoder.vocabulary:  # any other index would be taken for the last
            raise UserError(
                f"the tokenizer in {folder} makes token {max(rows[-1])} of {text!r}, and the text "
                f"encoder knows {encoder.vocabulary}, from 0 on: {OTHERS}"
            )
    if encoder.projection is not None and encoder.end not in (None, end):
        raise UserError(
            f"the tokenizer in {folder} ends texts with token {end}, and the text encoder reads "
            f"what a text says at token {encoder.end}: {OTHERS}"
        )
    return np.array(rows, np.int32)


def tokenizer_folder(directory: str) -> epath.Path:
    """Where the tokenizer of a text encoder is.

    Raises:
      UserError: it is not there.
    """
    path = epath.Path(directory)
    for folder in (path / "tokenizer", path):
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            return folder
    raise UserError(
        f"there is no tokenizer at {path}: {path / 'tokenizer'} needs vocab.json and merges.txt. "
        "Download tokenizer/ of the repository that the text encoder is from"
    )


def digest(directory: str) -> str:
    """SHA-256 of what decides a text's states: the encoder's files, and its tokenizer's.

    Raises:
      UserError: they are not there.
    """
    found = hashlib.sha256(huggingface.digest(directory, "text_encoder").encode())
    folder = tokenizer_folder(directory)
    for name in FILES:
        data = (folder / name).read_bytes() if (folder / name).is_file() else b""
        found.update(hashlib.sha256(data).digest())
    return found.hexdigest()


def _tokenizer(folder: epath.Path) -> Any:
    """CLIP's byte pairs, lower case, with a mark at the end of every word."""
    try:
        from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    except ImportError:
        raise UserError(
            "prompts are cut into tokens by the package tokenizers, which is not installed: "
            "pip install tokenizers; or take them over with --from=RUN from a run that has them"
        ) from None
    try:
        vocabulary = json.loads((folder / "vocab.json").read_text())
        _, *lines = (folder / "merges.txt").read_text().splitlines()  # the first is its version
        merges = [tuple(line.split(" ")) for line in lines if line.strip()]
        model = models.BPE(vocabulary, merges, unk_token=END, end_of_word_suffix="</w>")
    except Exception as error:  # the package raises plain ones
        raise UserError(
            f"the tokenizer in {folder} is damaged ({error}); download vocab.json and merges.txt "
            "again"
        ) from error
    tokenizer = Tokenizer(model)
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), spaces, normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(Regex(WORDS), "removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def _padding(folder: epath.Path) -> str:
    """The padding token: the end mark, in Stable Diffusion 2 "!", which is token 0."""
    for name in PADDING:
        if (folder / name).is_file():
            try:
                token = json.loads((folder / name).read_text("utf-8")).get("pad_token")
                if token:
                    return token if isinstance(token, str) else token["content"]
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"{folder / name} is damaged ({error!r}); download it again"
                ) from error
    return END


def encode(directory: str, texts: Sequence[str]) -> Encoded:
    """Let the text encoder of a directory read texts.

    Args:
      directory: a pipeline's, or a CLIP's own.
      texts: at least one.

    Raises:
      UserError: see :func:`tokenise` and ``huggingface.load``.
    """
    module, params = huggingface.load(directory, "text_encoder")
    assert isinstance(module, TextEncoder)
    tokens_BN = tokenise(directory, texts, module)
    run = jax.jit(module.encode)
    params = jax.device_put(params)
    parts = []
    for first in range(0, len(texts), BATCH):
        part = tokens_BN[first : first + BATCH]
        padded = np.pad(part, ((0, BATCH - len(part)), (0, 0)), "edge")
        parts.append([np.asarray(array)[: len(part)] for array in run(params, padded)])
    return Encoded(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def conditions(
    folder: epath.PathLike, directory: str, prompts: Sequence[str], negative: str = ""
) -> dict[str, np.ndarray]:
    """The states of prompts and of what says nothing, from the folder if they are kept there.

    Args:
      folder: where they are kept; made when needed.
      directory: of the text encoder and its tokenizer; if it is not there, what is kept is used.
      prompts: by label.
      negative: what classifier-free guidance leads away from.

    Returns:
      The params of a :class:`TextCondition`.

    Raises:
      UserError: they are not kept, and cannot be made; what is kept is damaged.
    """

    def make() -> dict[str, np.ndarray]:
        states_BND = encode(directory, [*prompts, negative]).states_BND
        return {"texts": states_BND[:-1], "null": states_BND[-1]}

    return _kept(folder, directory, {"prompts": list(prompts), "negative": negative}, make)


def embeddings(folder: epath.PathLike, directory: str, prompts: Sequence[str]) -> np.ndarray:
    """The embeddings of prompts, from the folder if they are kept there.

    Args:
      folder, directory, prompts: as of :func:`conditions`.

    Returns:
      (K, D) float32, not of unit length.

    Raises:
      UserError: as :func:`conditions`.
    """

    def make() -> dict[str, np.ndarray]:
        return {"embeddings": encode(directory, prompts).embeddings_BD}

    return _kept(folder, directory, {"prompts": list(prompts), "of": "embeddings"}, make)[
        "embeddings"
    ]


def _kept(
    folder: epath.PathLike,
    directory: str,
    about: dict[str, Any],
    make: Callable[[], dict[str, np.ndarray]],
) -> dict[str, np.ndarray]:
    """The tensors that are kept in a folder, made where those of ``about`` are not there."""
    folder = epath.Path(folder)
    kept = workdir.read_record(folder / RECORD) if (folder / RECORD).is_file() else {}
    fits = all(kept.get(key) == value for key, value in about.items())
    if epath.Path(directory).is_dir() or not fits:
        about = {**about, "encoder": digest(directory)}
    if all(kept.get(key) == value for key, value in about.items()):
        data = (folder / TENSORS).read_bytes() if (folder / TENSORS).exists() else b""
        if weights.sha256(data) != kept["sha256"]:
            raise UserError(
                f"{folder / TENSORS} is damaged: it is not what {RECORD} describes. Remove "
                f"{folder}, and it is made again"
            )
        return weights.unpack(data)
    tensors = make()
    data = weights.pack(tensors)
    workdir.write_bytes(folder / TENSORS, data)
    workdir.write_record(folder / RECORD, {**about, "sha256": weights.sha256(data)})
    return tensors
