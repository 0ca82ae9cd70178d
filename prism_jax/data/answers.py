"""What students said of real images: a class for every image, packed into text.

    validate/<student>/<seed>/answers.json   {"classes": 10, "test": "BwEDAg...", "held_out": ...}

A byte an image (two from 255 classes on), in base64. Students of older work have no such file.
"""

from __future__ import annotations

import base64

import numpy as np
from etils import epath

from prism_jax.data import workdir

FILE = "answers.json"
NONE = -1  # logits that are not finite say nothing


def write(folder: epath.Path, answers: dict[str, np.ndarray], classes: int) -> None:
    """Keep answers, by the part of the images that they are about.

    Args:
      folder: of the student.
      answers: int (N,) classes, or ``NONE``.
      classes: how many there are.
    """
    packed = {part: pack(answers_N, classes) for part, answers_N in answers.items()}
    workdir.write_record(folder / FILE, {"classes": classes, **packed})


def read(folder: epath.Path) -> dict[str, np.ndarray]:
    """Answers by part; empty where none were kept.

    Raises:
      UserError: the file is damaged.
    """
    if not (folder / FILE).exists():
        return {}
    found = workdir.read_record(folder / FILE)
    classes = found.pop("classes")
    return {part: unpack(text, classes) for part, text in found.items()}


def pack(answers_N: np.ndarray, classes: int) -> str:
    """Classes as text; none is written as the class after the last."""
    known = np.where(answers_N == NONE, classes, answers_N)
    return base64.b64encode(known.astype(_dtype(classes)).tobytes()).decode()


def unpack(text: str, classes: int) -> np.ndarray:
    """The classes, int32 (N,), or ``NONE``."""
    known = np.frombuffer(base64.b64decode(text), _dtype(classes)).astype(np.int32)
    return np.where(known == classes, NONE, known)


def _dtype(classes: int) -> str:
    """The narrowest that also holds the class after the last."""
    return "u1" if classes < 1 << 8 else "<u2" if classes < 1 << 16 else "<u4"


def pack_right(right_N: np.ndarray) -> str:
    """Which answers are right, a bit each: the number of them, a colon, base64."""
    return f"{len(right_N)}:{base64.b64encode(np.packbits(right_N).tobytes()).decode()}"


def unpack_right(text: str) -> np.ndarray:
    """bool (N,)."""
    count, _, bits = text.partition(":")
    return np.unpackbits(np.frombuffer(base64.b64decode(bits), np.uint8), count=int(count)) == 1
