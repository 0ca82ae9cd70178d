"""Encoded images to square pixels, as torchvision reads them."""

from __future__ import annotations

import functools
import hashlib
import io
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath
from PIL import Image, UnidentifiedImageError

from prism_jax.data.datasets import DatasetInfo
from prism_jax.data.image_set import UNREADABLE, DamagedFile

try:
    import simplejpeg  # the extra `fast`
except ImportError:
    simplejpeg = None

FETCH = "It is one of the real images: fetch it again or delete it, or set dataset.damaged=skip."

# The label of an image that cannot be read at all, where its label lies beside it.
UNREADABLE_LABEL = np.iinfo(np.int32).min

_JPEG = b"\xff\xd8\xff"


def decode(
    data: bytes,
    path: epath.PathLike,
    *,
    channels: int,
    image_size: int | None,
    resize_ratio: float,
) -> np.ndarray:
    """Decode an image file, to a square where ``image_size`` says so.

    Palette, CMYK, grey, transparent and 16-bit images are converted as Pillow converts them;
    the EXIF orientation is not applied (torchvision's ImageFolder does neither more nor less).

    Args:
      data: the encoded file.
      path: its name, for messages.
      channels: 1 (grey) or 3 (RGB).
      image_size, resize_ratio: an image of exactly this size is untouched; else its shorter
        side is resized to ``round(resize_ratio * image_size)`` and the centre cut out. None:
        it is left as it is.

    Returns:
      uint8 (image_size, image_size, channels), without ``image_size`` (H, W, channels).

    Raises:
      DamagedFile: the bytes are not a whole image.
    """
    if channels == 3 and (pixels_HWC := fast_jpeg(data)) is not None:
        if image_size is None or pixels_HWC.shape == (image_size, image_size, 3):
            return pixels_HWC
        return square(Image.fromarray(pixels_HWC), channels, image_size, resize_ratio)
    try:
        with Image.open(io.BytesIO(data)) as image:
            return square(image, channels, image_size, resize_ratio)
    except UnidentifiedImageError as error:  # Pillow's text names an object in memory
        raise DamagedFile(path, "is not a readable image (of no known format)", FETCH) from error
    except UNREADABLE as error:
        raise DamagedFile(path, f"is not a readable image ({error})", FETCH) from error


def fast_jpeg(data: bytes) -> np.ndarray | None:
    """Decode a JPEG file to uint8 RGB (H, W, 3) with simplejpeg, where that gives Pillow's pixels.

    Both call libjpeg-turbo with the exact DCT and smooth upsampling; simplejpeg does less around
    it. None for everything that Pillow shall judge: other formats, CMYK, and data that the
    decoder has any complaint about.
    """
    if simplejpeg is None or not data.startswith(_JPEG):
        return None
    try:
        _, _, space, _ = simplejpeg.decode_jpeg_header(data, strict=True)
        if space not in ("YCbCr", "Gray"):
            return None
        return simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False, strict=True)
    except ValueError:
        return None


def square(image: Image.Image, channels: int, size: int | None, resize_ratio: float) -> np.ndarray:
    """Convert an opened image; resize and crop it unless ``size`` is None: see :func:`decode`."""
    image = image.convert("L" if channels == 1 else "RGB")
    if size is not None and image.size != (size, size):
        width, height = image.size
        shorter, target = min(width, height), round(resize_ratio * size)
        # torchvision's Resize truncates the longer side, its CenterCrop rounds the offset.
        width, height = target * width // shorter, target * height // shorter
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = round((width - size) / 2), round((height - size) / 2)
        image = image.crop((left, top, left + size, top + size))
    pixels = np.array(image)
    return pixels[..., None] if channels == 1 else pixels


class EncodedSource:
    """Images that are stored encoded and decoded one by one.

    Args:
      info, split, image_size: what is read, and how large it is given out.
      count: number of images.
      labels: makes the labels, on first use; UNREADABLE_LABEL where there is none.
      num_classes, class_names: as in ``ImageSource``.
      read: the bytes of the image at a position.
      name: what messages call the image at a position.
      content: what a digest of the encoded images is taken of.
      stamp: the files with their sizes and times of change: a key for what is learned of them.
    """

    def __init__(
        self,
        info: DatasetInfo,
        split: str,
        image_size: int,
        *,
        count: int,
        labels: Callable[[], np.ndarray],
        num_classes: int,
        class_names: tuple[str, ...] | None,
        read: Callable[[int], bytes],
        name: Callable[[int], str],
        content: Callable[[], bytes],
        stamp: Callable[[], str],
        title: str | None = None,
    ):
        self._info, self.split, self._size, self._count = info, split, image_size, count
        self._labels, self._read, self._content = labels, read, content
        self._title = title or info.name
        self.name, self.stamp = name, stamp
        self.num_classes, self.class_names = num_classes, class_names
        self.imagenet_indices: tuple[int, ...] | None = None
        self.left_out = 0

    def __len__(self) -> int:
        return self._count

    @functools.cached_property
    def all_labels_N(self) -> np.ndarray:
        """The labels, with UNREADABLE_LABEL for images that cannot be read."""
        return np.asarray(self._labels(), np.int32)

    @functools.cached_property
    def labels_N(self) -> np.ndarray:
        unreadable = np.flatnonzero(self.all_labels_N == UNREADABLE_LABEL)
        if len(unreadable):
            raise DamagedFile(self.name(int(unreadable[0])), "cannot be read", FETCH)
        return self.all_labels_N

    def image(self, index: int) -> np.ndarray:
        return self._decode(index, self._size)

    def original(self, index: int) -> np.ndarray:
        return self._decode(index, None)

    def _decode(self, index: int, size: int | None) -> np.ndarray:
        try:
            data = self._read(index)
        except (OSError, RuntimeError, ValueError, IndexError) as error:
            raise DamagedFile(self.name(index), f"cannot be read ({error})", FETCH) from error
        return decode(
            data,
            self.name(index),
            channels=self._info.channels,
            image_size=size,
            resize_ratio=self._info.resize_ratio,
        )

    def describe(self) -> dict[str, Any]:
        return self._description

    @functools.cached_property
    def _description(self) -> dict[str, Any]:
        return {
            "name": self._title,
            "split": self.split,
            "count": len(self),
            "image_size": self._size,
            "digest": hashlib.sha256(self._content()).hexdigest(),
        }
