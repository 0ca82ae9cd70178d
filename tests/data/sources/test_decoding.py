from __future__ import annotations

import contextlib
import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from helpers.images import encoded, random_pixels
from PIL import Image

from prism_jax.data.image_set import DamagedFile
from prism_jax.data.sources import decode, decoding, open_source, read_all
from prism_jax.errors import UserError


def decoded(data: bytes, channels: int = 3, size: int = 8, ratio: float = 1.0) -> np.ndarray:
    return decode(data, "x.png", channels=channels, image_size=size, resize_ratio=ratio)


def test_an_image_of_the_exact_size_is_untouched():
    pixels = random_pixels(8, 8, 3)
    np.testing.assert_array_equal(decoded(encoded(pixels), ratio=256 / 224), pixels)


@pytest.mark.parametrize("height, width", [(300, 451), (451, 300), (257, 257), (40, 61), (700, 29)])
def test_resize_and_centre_crop_follow_torchvision(height, width):
    pixels = random_pixels(height, width, 3)
    found = decoded(encoded(pixels), size=56, ratio=256 / 224)
    # torchvision: Resize(64) gives the longer side int(64 * long / short); CenterCrop(56)
    # starts at int(round((side - 56) / 2)).
    short = min(height, width)
    sides = [64 if s == short else int(64 * s / short) for s in (height, width)]
    resized = Image.fromarray(pixels).resize(sides[::-1], Image.Resampling.BILINEAR)
    top, left = (int(round((s - 56) / 2.0)) for s in sides)
    np.testing.assert_array_equal(found, np.asarray(resized)[top : top + 56, left : left + 56])
    assert found.shape == (56, 56, 3)


def test_other_kinds_of_image_become_rgb_or_grey():
    colour, grey = random_pixels(8, 8, 3), random_pixels(8, 8)
    palette = Image.fromarray(colour).quantize(16)
    buffer = io.BytesIO()
    palette.save(buffer, "PNG")
    np.testing.assert_array_equal(decoded(buffer.getvalue()), np.asarray(palette.convert("RGB")))
    np.testing.assert_array_equal(decoded(encoded(grey)), np.repeat(grey[..., None], 3, axis=2))
    transparent = np.dstack([colour, random_pixels(8, 8, seed=1)])
    np.testing.assert_array_equal(decoded(encoded(transparent)), colour)
    luma = np.asarray(Image.fromarray(colour).convert("L"))[..., None]
    np.testing.assert_array_equal(decoded(encoded(colour), channels=1), luma)
    buffer = io.BytesIO()
    Image.fromarray(random_pixels(8, 8, 4), "CMYK").save(buffer, "JPEG")
    assert decoded(buffer.getvalue()).shape == (8, 8, 3)


@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG2000", "PCX", "PPM", "QOI", "TGA", "TIFF"])
def test_other_formats_are_told_by_their_bytes(kind):
    pixels = np.repeat(random_pixels(8, 8)[..., None], 3, axis=2)  # GIF keeps 256 colours
    np.testing.assert_array_equal(decoded(encoded(pixels, kind)), pixels)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG"])
def test_of_several_frames_the_first_is_taken(kind):
    first, second = (np.full((8, 8, 3), level, np.uint8) for level in (30, 200))
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(first, kind, save_all=True, append_images=[Image.fromarray(second)], **options)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 2
    np.testing.assert_array_equal(decoded(data), first)


def test_postscript_is_not_run():
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    assert Image.open(io.BytesIO(eps)).format == "EPS"  # Pillow knows it, and has it run
    with pytest.raises(DamagedFile, match="x.png is not a readable image"):
        decoded(eps)


def test_exif_orientation_is_not_applied():
    pixels, exif = random_pixels(8, 8, 3), Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees"
    plain, turned = encoded(pixels, "JPEG"), encoded(pixels, "JPEG", exif=exif)
    assert plain != turned
    np.testing.assert_array_equal(decoded(turned), decoded(plain))


# --- the fast decoder ---


def smooth(height: int, width: int) -> np.ndarray:
    """Colours with slopes and edges, on which the ways to decode JPEG differ."""
    small = Image.fromarray(random_pixels(max(1, height // 9), max(1, width // 9), 3, seed=height))
    return np.array(small.resize((width, height), Image.Resampling.BICUBIC))


def jpegs() -> dict[str, bytes]:
    found = {}
    for height, width in ((8, 8), (64, 64), (57, 83), (1, 1), (15, 301)):
        pixels = smooth(height, width)
        for subsampling in ("4:4:4", "4:2:2", "4:2:0"):
            for name, options in {
                "": {},
                "progressive": {"progressive": True},
                "restarts": {"restart_marker_rows": 1},
                "coarse": {"quality": 20},
                "fine": {"quality": 100},
            }.items():
                key = f"{height}x{width} {subsampling} {name}"
                found[key] = encoded(pixels, "JPEG", subsampling=subsampling, **options)
        found[f"{height}x{width} grey"] = encoded(pixels[..., 0], "JPEG")
        found[f"{height}x{width} RGB"] = encoded(pixels, "JPEG", keep_rgb=True)
    return found


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_the_fast_decoder_gives_pillows_pixels():
    pytest.importorskip("simplejpeg", reason="the extra `fast`")
    decoded = {name: decoding.fast_jpeg(data) for name, data in jpegs().items()}
    left = [name for name, pixels in decoded.items() if pixels is None]
    assert left == [name for name in decoded if "RGB" in name]  # those are Pillow's
    for name, data in jpegs().items():
        if decoded[name] is not None:
            np.testing.assert_array_equal(decoded[name], by_pillow(data), err_msg=name)


def test_the_shortcuts_that_it_does_not_take_would_be_seen():
    simplejpeg = pytest.importorskip("simplejpeg", reason="the extra `fast`")
    data = encoded(smooth(57, 83), "JPEG", subsampling="4:2:0")
    for shortcut in ({"fastdct": True}, {"fastupsample": True}):
        pixels = simplejpeg.decode_jpeg(data, "RGB", **shortcut)
        assert not np.array_equal(pixels, by_pillow(data)), shortcut


def test_what_the_fast_decoder_complains_of_is_pillows_to_judge(monkeypatch):
    pytest.importorskip("simplejpeg", reason="the extra `fast`")
    data = encoded(smooth(57, 83), "JPEG", quality=95)
    noise = bytes(random_pixels(40))
    cases = [data[: len(data) // 2], data[:300], data[:400] + noise + data[440:], data + noise]
    cases += [data[:-2], data[:3], b""]
    found = []
    for use in (decoding.simplejpeg, None):
        monkeypatch.setattr(decoding, "simplejpeg", use)
        found.append([])
        for case in cases:
            try:
                found[-1].append(decoded(case, size=32).tobytes())
            except DamagedFile as error:
                found[-1].append(str(error))
    assert found[0] == found[1]
    assert any("is not a readable image" in str(one) for one in found[0])


def test_cmyk_is_left_to_pillow():
    buffer = io.BytesIO()
    Image.fromarray(random_pixels(8, 8, 4), "CMYK").save(buffer, "JPEG")
    assert decoding.fast_jpeg(buffer.getvalue()) is None


# --- sizes that do not fit ---


def flat_png(width: int, height: int) -> bytes:
    """A one-bit PNG of any size, some kilobytes of it."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + crc(kind + content)

    def crc(content: bytes) -> bytes:
        return struct.pack(">I", zlib.crc32(content))

    pack = zlib.compressobj(9)
    row = b"\0" + b"\x5a" * ((width + 7) // 8)
    packed = b"".join(pack.compress(row) for _ in range(height)) + pack.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def test_more_pixels_than_the_limit_are_refused_by_name_before_they_are_decoded():
    data = flat_png(15_000, 12_000)
    with pytest.raises(DamagedFile, match="x.png is too large.*178,956,970 pixels.*damaged=skip"):
        decoded(data)


def test_the_fast_decoder_makes_no_image_of_more_pixels_than_the_limit(monkeypatch):
    pytest.importorskip("simplejpeg", reason="the extra `fast`")
    data = bytearray(encoded(random_pixels(8, 8, 3), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 60_000, 60_000)
    assert decoding.fast_jpeg(bytes(data)) is None
    with pytest.raises(DamagedFile, match="is too large"):
        decoded(bytes(data))


PEAK = """
import resource, sys
from prism_jax.data.sources import decode, decoding

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

data, before = sys.stdin.buffer.read(), peak()
decoding._LARGE = int(sys.argv[1])
image = decode(data, "x.png", channels=3, image_size=224, resize_ratio=256 / 224)
assert image.shape == (224, 224, 3)
print(peak() - before)
"""


def peak_megabytes(pixels: np.ndarray, large: int) -> float:
    # A new program's peak begins at that of the process it was split from: here a small shell.
    command = ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-c", PEAK, str(large)]
    return float(subprocess.run(command, input=encoded(pixels), stdout=-1, check=True).stdout)


@pytest.mark.parametrize("shape", [(1, 30_000, 3), (30_000, 1, 3)])
def test_a_thin_picture_takes_memory_of_the_order_of_the_result(shape):
    assert peak_megabytes(random_pixels(*shape), decoding._LARGE) < 100


def test_enlarged_as_a_whole_it_would_not():
    assert peak_megabytes(random_pixels(1, 1500, 3), large=1 << 40) > 200


def test_an_image_that_memory_does_not_hold_is_named(monkeypatch):
    def out_of_memory(*_):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", out_of_memory)
    with pytest.raises(UserError, match="x.png does not fit into memory"):
        decoded(encoded(random_pixels(8, 8)))


# --- torchvision ---


def import_torchvision():
    torch = pytest.importorskip("torch", reason="compares with torchvision")
    # Its compiled operators are not needed, but it looks for them when imported.
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        with contextlib.suppress(RuntimeError):  # they are there
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library, pytest.importorskip("torchvision")


def odd_images() -> dict[str, bytes]:
    """One image of every kind that is not plain RGB, and plain ones of several shapes."""
    exif = Image.Exif()
    exif[0x0112] = 6

    def saved(image: Image.Image, kind: str, **options) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    pixels = smooth(90, 131)
    image = Image.fromarray(pixels)
    transparent = Image.fromarray(np.dstack([pixels, random_pixels(90, 131)]))
    palette = image.quantize(32)
    return {
        "a rgb.png": saved(image, "PNG"),
        "b rgb.jpg": saved(image, "JPEG"),
        "c tall.jpg": saved(Image.fromarray(smooth(200, 77)), "JPEG", subsampling="4:2:0"),
        "d small.jpeg": saved(Image.fromarray(smooth(20, 31)), "JPEG"),
        "e grey.jpg": saved(image.convert("L"), "JPEG"),
        "f cmyk.jpg": saved(image.convert("CMYK"), "JPEG"),
        "g turned.jpg": saved(image, "JPEG", exif=exif),
        "h bitmap.bmp": saved(image, "BMP"),
        "i palette.png": saved(palette, "PNG"),
        "j palette with a transparent colour.png": saved(palette, "PNG", transparency=3),
        "k transparent.png": saved(transparent, "PNG"),
        "l grey and transparent.png": saved(transparent.convert("LA"), "PNG"),
        "m one bit.png": saved(image.convert("1"), "PNG"),
        "n lossy.webp": saved(image, "WEBP"),
        "o transparent.webp": saved(transparent, "WEBP", lossless=True),
        "p size of the crop.png": saved(Image.fromarray(smooth(56, 56)), "PNG"),
    }


@pytest.mark.filterwarnings("ignore:.*classes of imagenet:UserWarning")
@pytest.mark.parametrize("fast", [True, False])
def test_images_come_out_as_torchvision_reads_them(tmp_path, monkeypatch, fast):
    _library, torchvision = import_torchvision()
    if fast:
        pytest.importorskip("simplejpeg", reason="the extra `fast`")
    else:
        monkeypatch.setattr(decoding, "simplejpeg", None)
    for name, data in odd_images().items():
        path = tmp_path / "train" / f"class {name[0]}" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
    source = open_source(
        name="imagenet", source="folder", path=tmp_path, split="train", image_size=56
    )
    images, labels = read_all(source)
    transforms = torchvision.transforms
    peer = torchvision.datasets.ImageFolder(
        tmp_path / "train",
        transforms.Compose([transforms.Resize(64), transforms.CenterCrop(56)]),
    )
    assert len(peer) == len(source) == len(odd_images())
    for i, (picture, label) in enumerate(peer):
        name = source.name(i)
        assert labels[i] == label
        if "size of the crop" in name:  # ours leaves such an image alone
            np.testing.assert_array_equal(images[i], smooth(56, 56))
            continue
        np.testing.assert_array_equal(images[i], np.asarray(picture), err_msg=name)
    # The twin: another filter is off by more than the 1/255 that would be allowed.
    other = transforms.Resize(64, transforms.InterpolationMode.BICUBIC)
    picture = transforms.CenterCrop(56)(other(peer.loader(peer.samples[0][0])))
    assert np.abs(images[0].astype(int) - np.asarray(picture)).max() > 1


@pytest.mark.filterwarnings("ignore:.*classes of imagenet:UserWarning")
def test_resizing_equals_torchs_own_to_one_level(tmp_path):
    _library, torchvision = import_torchvision()
    import torch

    pixels = smooth(90, 131)
    path = tmp_path / "train" / "a" / "a.png"
    path.parent.mkdir(parents=True)
    path.write_bytes(encoded(pixels))
    source = open_source(
        name="imagenet", source="folder", path=tmp_path, split="train", image_size=56
    )
    transforms = torchvision.transforms
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    peer = transforms.CenterCrop(56)(transforms.Resize(64, antialias=True)(tensor))
    difference = source.image(0).astype(int) - peer.permute(1, 2, 0).numpy()
    assert np.abs(difference).max() <= 1
