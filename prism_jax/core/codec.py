"""What is kept of soft labels: rounding and pruning of logits, on the host, in NumPy.

Labels from a store and labels made on the fly pass through the same two functions, so that
students see the same bits either way. A row is everything kept of one image, a NumPy structure:

======  =======  =====================================================================
kept    uint8    top_k only: ceil(K / 8) bytes, one bit per class, the first class first
fill    float32  top_k only: the mean of the logits that were dropped
offset  float32  int8 only: the middle of the range of the kept logits
scale   float32  int8 only: a 254th of that range
values           the kept logits in the order of the classes, or their int8 codes
======  =======  =====================================================================

int8: ``code = round((logit - offset) / scale)``, in [-127, 127], and
``logit ~ offset + scale * code``, at most half a scale off. Numbers are little-endian.
"""

from __future__ import annotations

import dataclasses

import numpy as np

PRECISIONS = {"float32": "<f4", "float16": "<f2", "int8": "i1"}

_CODES = 127


@dataclasses.dataclass(frozen=True)
class Coding:
    """How logits are kept.

    Attributes:
      precision: a key of ``PRECISIONS``.
      top_k: how many of the largest logits are kept, fewer than there are classes; the others
        come back as their mean. None keeps all.
    """

    precision: str = "float16"
    top_k: int | None = None

    def row(self, num_classes: int) -> np.dtype:
        """The structure of a row."""
        fields: list[tuple] = []
        if self.top_k is not None:
            fields += [("kept", "u1", (-(-num_classes // 8),)), ("fill", "<f4")]
        if self.precision == "int8":
            fields += [("offset", "<f4"), ("scale", "<f4")]
        return np.dtype(
            [*fields, ("values", PRECISIONS[self.precision], (self.top_k or num_classes,))]
        )


def encode(logits_BK: np.ndarray, coding: Coding) -> np.ndarray:
    """Round and prune.

    Args:
      logits_BK: float32.
      coding: how.

    Returns:
      (B,) rows of ``coding.row(K)``.

    Raises:
      ValueError: logits that are not finite, before or after rounding.
    """
    refusal = ValueError(f"logits that are not finite in {coding.precision}")
    if not np.isfinite(logits_BK).all():
        raise refusal
    rows_B = np.zeros(len(logits_BK), coding.row(logits_BK.shape[1]))
    kept_BM = logits_BK
    if coding.top_k is not None:
        # A stable order: where logits tie, the lower class is kept.
        largest = np.argsort(-logits_BK, axis=1, kind="stable")[:, : coding.top_k]
        mask_BK = np.zeros(logits_BK.shape, bool)
        np.put_along_axis(mask_BK, largest, True, axis=1)
        kept_BM = logits_BK[mask_BK].reshape(largest.shape)
        rows_B["kept"] = np.packbits(mask_BK, axis=1)
        rows_B["fill"] = logits_BK.mean(1, np.float64, where=~mask_BK)
    if coding.precision == "int8":
        low_B, high_B = kept_BM.min(1), kept_BM.max(1)
        rows_B["offset"] = offset_B = low_B / 2 + high_B / 2
        rows_B["scale"] = scale_B = high_B / (2 * _CODES) - low_B / (2 * _CODES)
        codes_BM = (kept_BM - offset_B[:, None]) / np.where(scale_B > 0, scale_B, 1)[:, None]
        kept_BM = np.rint(codes_BM).clip(-_CODES, _CODES)
    with np.errstate(over="ignore"):  # the check below says it better
        rows_B["values"] = kept_BM
    if not np.isfinite(rows_B["values"]).all():
        raise refusal
    return rows_B


def decode(rows_B: np.ndarray, num_classes: int) -> np.ndarray:
    """The float32 (B, K) logits of rows."""
    logits_BM = rows_B["values"].astype(np.float32)
    names = rows_B.dtype.names or ()
    if "scale" in names:
        logits_BM = rows_B["offset"][:, None] + rows_B["scale"][:, None] * logits_BM
    if "kept" not in names:
        return logits_BM
    mask_BK = np.unpackbits(rows_B["kept"], axis=1, count=num_classes).astype(bool)
    logits_BK = np.repeat(rows_B["fill"][:, None], num_classes, axis=1)
    logits_BK[mask_BK] = logits_BM.ravel()
    return logits_BK
