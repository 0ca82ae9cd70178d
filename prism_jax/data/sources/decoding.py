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
from prism_jax.data.image_set import DamagedFile
from prism_jax.data.sources import resampling
from prism_jax.data.sources.depth import NoRange, to_bytes
from prism_jax.data.sources.kinds import formats
from prism_jax.errors import UserError

try:
    import simplejpeg  # the extra `fast`
except ImportError:
    simplejpeg = None

FETCH = "It is one of the real images: fetch it again or delete it, or set dataset.damaged=skip."
NO_RANGE = "Store it with 8 or 16 bits, or delete it, or set dataset.damaged=skip."
TOO_LARGE = "Store it smaller or delete it, or set dataset.damaged=skip."

# The label of an image that cannot be read at all, where its label lies beside it.
UNREADABLE_LABEL = np.iinfo(np.int32).min

_JPEG = b"\xff\xd8\xff"

# Above so many pixels an image is neither held twice nor enlarged as a whole.
_LARGE = 1 << 24


def decode(
    data: bytes,
    path: epath.PathLike,
    *,
    channels: int,
    image_size: int | None,
    resize_ratio: float,
) -> np.ndarray:
    """Decode an image file, to a square where ``image_size`` says so.

    Palette, CMYK, grey and transparent images are converted as Pillow converts them, deeper ones
    as ``depth`` says; of several frames the first is taken. The EXIF orientation is not applied
    (torchvision's ImageFolder does neither more nor less).

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
      DamagedFile: the bytes are not a whole image, or one that cannot be shown in 8 bits, or of
        more pixels than Pillow's limit.
      UserError: memory does not suffice for it.
    """
    try:
        if channels == 3 and (pixels_HWC := fast_jpeg(data)) is not None:
            if image_size is None or pixels_HWC.shape == (image_size, image_size, 3):
                return pixels_HWC
            image = Image.fromarray(pixels_HWC)
        else:
            image = _opened(data, path)
        return square(image, channels, image_size, resize_ratio)
    except NoRange as error:
        raise DamagedFile(path, str(error), NO_RANGE) from error
    except ValueError as error:  # a mode without a way to grey or RGB
        raise DamagedFile(path, f"is not a readable image ({error})", FETCH) from error
    except MemoryError as error:
        raise UserError(
            f"{path} does not fit into memory; lower dataset.threads or dataset.workers, each of "
            f"which holds an image, or store it smaller"
        ) from error


def _opened(data: bytes, path: epath.PathLike) -> Image.Image:
    """An image with its pixels loaded."""
    try:
        image = Image.open(io.BytesIO(data), formats=formats())
        image.load()
    except UnidentifiedImageError as error:  # Pillow's text names an object in memory
        raise DamagedFile(path, "is not a readable image (of no known format)", FETCH) from error
    except Image.DecompressionBombError as error:
        limit = f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels"
        raise DamagedFile(path, f"is too large to be read ({limit})", TOO_LARGE) from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds for bytes they cannot use
        reason = str(error) or type(error).__name__
        raise DamagedFile(path, f"is not a readable image ({reason})", FETCH) from error
    return image


def fast_jpeg(data: bytes) -> np.ndarray | None:
    """Decode a JPEG file to uint8 RGB (H, W, 3) with simplejpeg, where that gives Pillow's pixels.

    Both call libjpeg-turbo with the exact DCT and smooth upsampling; simplejpeg does less around
    it. None for everything that Pillow shall judge: other formats, CMYK, large images, and data
    that the decoder has any complaint about.
    """
    if simplejpeg is None or not data.startswith(_JPEG):
        return None
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data, strict=True)
        if space not in ("YCbCr", "Gray") or height * width > _LARGE:
            return None
        return simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False, strict=True)
    except ValueError:
        return None


def square(image: Image.Image, channels: int, size: int | None, resize_ratio: float) -> np.ndarray:
    """Convert an opened image; resize and crop it unless ``size`` is None: see :func:`decode`.

    Memory is of the order of the image and of the result, whatever the image's sides.
    """
    mode, shallow = "L" if channels == 1 else "RGB", to_bytes(image)

    def converted(part: Image.Image) -> Image.Image:
        part = shallow(part)
        return part if part.mode == mode else part.convert(mode)

    if size is None or image.size == (size, size):
        image = converted(image)
    else:
        width, height = image.size
        shorter, target = min(width, height), round(resize_ratio * size)
        # torchvision's Resize truncates the longer side, its CenterCrop rounds the offset.
        new = target * width // shorter, target * height // shorter
        left, top = round((new[0] - size) / 2), round((new[1] - size) / 2)
        box = left, top, left + size, top + size
        if new[0] * new[1] > _LARGE and shorter < target:
            return resampling.window(image, converted, new, box)
        image = converted(image).resize(new, Image.Resampling.BILINEAR).crop(box)
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
      title: what the set calls itself; None: as ``info`` does.
      left_out: files beside the images that are none.
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
        left_out: int = 0,
    ):
        self._info, self.split, self._size, self._count = info, split, image_size, count
        self._labels, self._read, self._content = labels, read, content
        self._title = title or info.name
        self.name, self.stamp = name, stamp
        self.num_classes, self.class_names = num_classes, class_names
        self.imagenet_indices: tuple[int, ...] | None = None
        self.left_out = left_out

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
