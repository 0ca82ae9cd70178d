"""Arrays of images as bi-level methods keep them: floats in a space that must be known."""

from __future__ import annotations

import json
import warnings

import numpy as np

from prism_jax.data.sets.base import Stated
from prism_jax.data.sources import ImageSource, read_all
from prism_jax.errors import UserError

MEAN, STD, WHITENING = (f"recover.initialise_{n}" for n in ("mean", "std", "whitening"))
WHITENINGS = ("none", "zca")
ZCA_EPSILON = 0.1  # of kornia's ZCAWhitening as MTT, DATM and DD-Ranking use it
ZCA_LARGEST = 4096  # numbers of an image: its covariance is that number squared
_INVERSES: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # of the real images seen last
_TOLD = 0.01  # a share of clipped values above this is told


def to_pixels(path: str, images: np.ndarray, stated: Stated, real: ImageSource) -> np.ndarray:
    """uint8 images_NHWC of an array of images in any of the usual layouts and spaces.

    Args:
      path: for messages.
      images: uint8, or floats in the space that ``stated`` describes; NCHW, NHWC or NHW.
      stated: mean and std of the floats, and whether they are whitened.
      real: the training images, from which a whitening is computed.

    Raises:
      UserError: another layout, or floats whose space is not stated.
    """
    images = _nhwc(path, np.asarray(images))
    if images.dtype == np.uint8:
        return images
    if images.dtype.kind in "biuOSU":
        raise UserError(f"{path} has images of type {images.dtype}; they must be uint8 or floats")
    images = images.astype(np.float32)
    if not np.isfinite(images).all():
        raise UserError(f"{path} has images with numbers that are not finite")
    if stated.whitening == "zca":
        images = unwhitened(path, images, real)
    elif stated.mean is None or stated.std is None:
        raise UserError(_asked(path, images))
    else:
        channels = images.shape[-1]
        if len(stated.mean) != channels or len(stated.std) != channels:
            raise UserError(
                f"{MEAN} and {STD} have {len(stated.mean)} and {len(stated.std)} numbers; the "
                f"images of {path} have {channels} channels"
            )
        images = images * np.array(stated.std, np.float32) + np.array(stated.mean, np.float32)
    outside = float(((images < -0.5 / 255) | (images > 255.5 / 255)).mean())
    if outside > _TOLD:
        warnings.warn(
            f"{outside:.0%} of the values of {path} are darker than black or lighter than white as "
            f"they are read, and are clipped. Optimised images have some such values; many mean "
            f"another normalisation or whitening than stated ({MEAN}, {STD}, {WHITENING})",
            stacklevel=2,
        )
    return np.clip(np.rint(images * 255), 0, 255).astype(np.uint8)


def _nhwc(path: str, images: np.ndarray) -> np.ndarray:
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or not len(images):
        raise UserError(f"{path} has images of shape {images.shape}; they must be N x C x H x W")
    first, last = images.shape[1] in (1, 3), images.shape[3] in (1, 3)
    if first and last and images.shape[1:3] != images.shape[2:4]:
        first = images.shape[2] == images.shape[3]
        last = images.shape[1] == images.shape[2]
    if first == last:
        raise UserError(
            f"{path} has images of shape {images.shape}; which axis has the 1 or 3 channels is not "
            "clear: save them as N x C x H x W"
        )
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1)) if first else images


def _asked(path: str, images: np.ndarray) -> str:
    channels = images.shape[-1]
    mean, std = images.mean((0, 1, 2)), images.std((0, 1, 2))

    def flags(mean: str, std: str) -> str:
        return f"--config.{MEAN}={mean} --config.{STD}={std}"

    zeros, ones = (",".join([number] * channels) for number in "01")
    return (
        f"{path} has float images from {images.min():.3g} to {images.max():.3g} (per channel mean "
        f"{_words(mean)}, deviation {_words(std)}), and "
        f"the file does not say in which space. State one of\n"
        f"  {flags(zeros, ones)}   as they are: 0 is black, 1 is white\n"
        f"  {flags('M', 'S')}   normalised by these numbers, as the method's code has them\n"
        f"  --config.{WHITENING}=zca   whitened (MTT and DATM with --zca on CIFAR)"
    )


def _words(numbers: np.ndarray) -> str:
    return " ".join(f"{number:.3g}" for number in numbers)


def unwhitened(path: str, images_NHWC: np.ndarray, real: ImageSource) -> np.ndarray:
    """Undo a ZCA whitening computed from the real training images in [0, 1].

    It is that of MTT, DATM and DD-Ranking: of all training images, channels first, with epsilon 0.1
    beside the eigenvalues of the covariance.

    Raises:
      UserError: images of another shape than the real ones, or too large for a covariance.
    """
    size = int(np.prod(images_NHWC.shape[1:]))
    if size > ZCA_LARGEST:
        raise UserError(
            f"{WHITENING}=zca undoes the whitening of images of up to {ZCA_LARGEST} numbers; those "
            f"of {path} have {size}: save them unwhitened (MTT's images_zca_*.pt are)"
        )
    shape = real.image(0).shape
    if shape != images_NHWC.shape[1:]:
        raise UserError(
            f"{WHITENING}=zca needs real images of the shape of those of {path}, "
            f"{images_NHWC.shape[1:]}, from which the whitening was computed; they have "
            f"{shape}: set dataset.image_size"
        )
    key = json.dumps(real.describe())
    if key not in _INVERSES:  # a run looks at its set more than once; this takes a minute
        _INVERSES.clear()
        pixels, _ = read_all(real)
        _INVERSES[key] = zca_inverse(_flat(pixels.astype(np.float32) / np.float32(255)))
    mean, inverse = _INVERSES[key]
    rows = _flat(images_NHWC) @ inverse + mean
    height, width, channels = images_NHWC.shape[1:]
    return rows.reshape(-1, channels, height, width).transpose(0, 2, 3, 1).astype(np.float32)


def zca_inverse(rows_ND: np.ndarray, epsilon: float = ZCA_EPSILON) -> tuple[np.ndarray, np.ndarray]:
    """The mean (D,) and the matrix (D, D) with ``row = whitened @ matrix + mean``.

    whitened = (row - mean) U diag((s + epsilon)^-1/2) U^T, of the unbiased covariance U diag(s)
    U^T.
    """
    mean = rows_ND.mean(0, dtype=np.float64).astype(rows_ND.dtype)
    centred = rows_ND - mean
    values, vectors = np.linalg.eigh((centred.T @ centred).astype(np.float64) / (len(centred) - 1))
    return mean, (vectors * np.sqrt(np.maximum(values, 0) + epsilon)) @ vectors.T


def _flat(images_NHWC: np.ndarray) -> np.ndarray:
    return images_NHWC.transpose(0, 3, 1, 2).reshape(len(images_NHWC), -1)
