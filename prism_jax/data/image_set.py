"""The synthetic set on disk: one PNG per image, in folders that ``ImageFolder`` reads in order.

    <root>/<class:05d>/<slot:05d>.png

PNG is lossless, so the stored pixels are the truth. Files are written whole: present means done.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from etils import epath
from PIL import Image

from prism_jax.data import workdir
from prism_jax.data.lazy import Images, LazyImages, OneByOne, chunks
from prism_jax.errors import UserError

# What Pillow raises for bytes that are no image, or only a part of one.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)

_THREADS = 8
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


class DamagedFile(UserError):
    """A file that should be there is missing, cut short or altered; ``path`` names it."""

    def __init__(
        self,
        path: epath.PathLike,
        problem: str,
        remedy: str = "Move it away and run the same command again to redo it.",
    ):
        super().__init__(f"{path} {problem}. {remedy}")
        self.path = epath.Path(path)
        self.problem = problem


def image_path(root: epath.PathLike, cls: int, slot: int) -> epath.Path:
    """Where the image of a class and slot is stored."""
    return epath.Path(root) / f"{cls:05d}" / f"{slot:05d}.png"


def write_images(
    root: epath.PathLike,
    images_uint8_BHWC: np.ndarray,
    classes_B: Iterable[int],
    slots_B: Iterable[int],
) -> None:
    """Write images, each whole.

    Args:
      root: folder of the set.
      images_uint8_BHWC: pixels, with one channel (grey) or three (RGB).
      classes_B, slots_B: where each image belongs.
    """
    images = np.asarray(images_uint8_BHWC)
    assert images.dtype == np.uint8 and images.ndim == 4 and images.shape[-1] in (1, 3)

    def write(image: np.ndarray, cls: int, slot: int) -> None:
        buffer = io.BytesIO()
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, "PNG")
        workdir.write_bytes(image_path(root, cls, slot), buffer.getvalue())

    # Devices wait for it: in threads, for packing takes long, and so do uploads.
    paths = [tuple(x) for x in zip(classes_B, slots_B, strict=True)]
    with ThreadPoolExecutor(_THREADS) as threads:
        for done in [threads.submit(write, x, *p) for x, p in zip(images, paths, strict=True)]:
            done.result()


def write_set(
    root: epath.PathLike, images_uint8_NHWC: Images, classes_N: np.ndarray, slots_N: np.ndarray
) -> str:
    """Write a whole set, each image read once; returns its ``digest``."""
    sha = _begun(images_uint8_NHWC)
    for part in chunks(len(images_uint8_NHWC)):
        images = images_uint8_NHWC[part]
        write_images(root, images, classes_N[part], slots_N[part])
        sha.update(np.ascontiguousarray(images).data)
    return sha.hexdigest()


def is_whole(root: epath.PathLike, count: int) -> bool:
    """Whether a folder has as many images as a set; they are written in any order."""
    return sum(1 for _ in epath.Path(root).glob("*/*.png")) == count


def through_jpeg(images_uint8_BHWC: np.ndarray, quality: int) -> np.ndarray:
    """What is left of images after JPEG, with Pillow's other defaults (chroma subsampling)."""

    def lossy(image_HWC: np.ndarray) -> np.ndarray:
        buffer, grey = io.BytesIO(), image_HWC.shape[-1] == 1
        Image.fromarray(image_HWC[..., 0] if grey else image_HWC).save(
            buffer, "JPEG", quality=quality
        )
        pixels = np.array(Image.open(buffer))
        return pixels[..., None] if grey else pixels

    return np.stack([lossy(image) for image in images_uint8_BHWC])


def read_images(root: epath.PathLike, num_classes: int, ipc: int) -> tuple[np.ndarray, np.ndarray]:
    """Read a whole set.

    Returns:
      uint8 images_NHWC in class-major order (index = class * ipc + slot), int32 labels_N.

    Raises:
      DamagedFile: the first image that is missing or damaged.
    """
    labels_N = np.repeat(np.arange(num_classes, dtype=np.int32), ipc)
    return lazy_images(root, num_classes, ipc, threads=_THREADS)[:], labels_N


def lazy_images(
    root: epath.PathLike, num_classes: int, ipc: int, *, threads: int = _THREADS
) -> LazyImages:
    """A set whose images are read when they are indexed, in the order of ``read_images``.

    Raises:
      DamagedFile: the first image is missing or damaged; indexing raises it for others.
    """
    first = image_path(root, 0, 0)
    shape = read_image(first).shape

    def read(index: int) -> np.ndarray:
        path = image_path(root, *divmod(index, ipc))
        image = read_image(path)
        if image.shape != shape:
            raise DamagedFile(path, f"has shape {image.shape}; {first} has {shape}")
        return image

    return LazyImages(OneByOne(read, threads=threads), (num_classes * ipc, *shape))


def read_image(path: epath.PathLike) -> np.ndarray:
    """Read one stored image as uint8 (H, W, C).

    Raises:
      DamagedFile: it is missing or damaged.
    """
    try:
        data = epath.Path(path).read_bytes()
    except FileNotFoundError:
        raise DamagedFile(path, "is missing") from None
    if not data.endswith(_PNG_END):
        raise DamagedFile(path, "is damaged (it does not end like a PNG file)")
    try:
        # Decoding alone does not compare the checksums; verify() does, and uses the file up.
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            image.verify()
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            pixels = np.array(image)
            mode = image.mode
    except UNREADABLE as error:
        raise DamagedFile(path, f"is damaged ({error})") from error
    if mode not in ("L", "RGB"):
        raise DamagedFile(path, f"is a {mode} image, not 8-bit grey or RGB")
    return pixels[..., None] if mode == "L" else pixels


def digest(images_uint8_NHWC: Images) -> str:
    """The SHA-256 of pixels and shape, in hexadecimal: independent of how a PNG encodes them."""
    sha = _begun(images_uint8_NHWC)
    for part in chunks(len(images_uint8_NHWC)):
        sha.update(np.ascontiguousarray(images_uint8_NHWC[part]).data)
    return sha.hexdigest()


def _begun(images_uint8_NHWC: Images) -> hashlib._Hash:
    assert images_uint8_NHWC.dtype == np.uint8
    return hashlib.sha256(repr(images_uint8_NHWC.shape).encode())
