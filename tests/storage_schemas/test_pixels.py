from __future__ import annotations

import contextlib
import io
import struct
import time
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from storage_schemas.crops import CropBox
from storage_schemas.pixels import ImageError, cut, decode, image_size
from storage_schemas.views import ViewStatus

LIMIT = 2**20
RGB = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8).repeat(2, 0).repeat(2, 1)  # 48 80 3
PICTURE = Image.fromarray(RGB)
GRAY16 = RGB[..., 0].astype(np.uint16) * 256 + 77


def encode(picture: Image.Image, kind: str, **settings: object) -> bytes:
    sink = io.BytesIO()
    picture.save(sink, kind, **settings)
    return sink.getvalue()


def rotated_exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x112] = 6
    return exif


IMAGES = {
    "jpeg": encode(PICTURE, "JPEG"),
    "jpeg progressive": encode(PICTURE, "JPEG", progressive=True, quality=90),
    "jpeg gray": encode(PICTURE.convert("L"), "JPEG"),
    "jpeg cmyk": encode(PICTURE.convert("CMYK"), "JPEG"),
    "jpeg rotated": encode(PICTURE, "JPEG", exif=rotated_exif()),
    "jpeg comment": encode(PICTURE, "JPEG", comment=b"\xff\xc0" * 9),
    "png": encode(PICTURE, "PNG"),
    "png gray": encode(PICTURE.convert("L"), "PNG"),
    "png gray alpha": encode(PICTURE.convert("LA"), "PNG"),
    "png 16-bit": encode(Image.fromarray(GRAY16), "PNG"),
    "png bilevel": encode(PICTURE.convert("1"), "PNG"),
    "png palette": encode(PICTURE.convert("P"), "PNG"),
    "png palette transparent": encode(PICTURE.convert("P"), "PNG", transparency=bytes(range(200))),
    "png alpha": encode(PICTURE.convert("RGBA"), "PNG"),
    "png rotated": encode(PICTURE, "PNG", exif=rotated_exif()),
    "png animated": encode(PICTURE, "PNG", save_all=True, append_images=[PICTURE.rotate(90)]),
    "webp": encode(PICTURE, "WEBP"),
    "webp lossless": encode(PICTURE, "WEBP", lossless=True),
    "webp alpha": encode(PICTURE.convert("RGBA"), "WEBP", lossless=True),
    "webp rotated": encode(PICTURE, "WEBP", lossless=True, exif=rotated_exif()),
}


def png_header(height: int, width: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


def status_of(data: bytes, max_pixels: int = LIMIT) -> ViewStatus:
    with pytest.raises(ImageError) as caught:
        decode(data, max_pixels)
    assert str(caught.value)
    assert "\n" not in str(caught.value)
    assert "/" not in str(caught.value)
    return caught.value.status


@pytest.mark.parametrize("kind", IMAGES)
def test_every_kind_becomes_rgb_of_the_size_in_its_header(kind: str) -> None:
    image = decode(IMAGES[kind], LIMIT)
    assert image.shape == (3, 48, 80)
    assert image.dtype == torch.uint8
    assert image_size(IMAGES[kind], LIMIT) == (48, 80)


@pytest.mark.parametrize(
    "kind", ["png", "png alpha", "png rotated", "png animated", "webp lossless", "webp rotated"]
)
def test_lossless_images_are_exact_and_not_rotated(kind: str) -> None:
    assert np.array_equal(decode(IMAGES[kind], LIMIT).permute(1, 2, 0), RGB)


def test_sixteen_bits_keep_the_high_byte() -> None:
    assert np.array_equal(decode(IMAGES["png 16-bit"], LIMIT)[0], GRAY16 >> 8)


@pytest.mark.parametrize("kind", IMAGES)
def test_a_truncated_image_is_an_error_at_every_length(kind: str) -> None:
    data = IMAGES[kind]
    for length in {*range(0, 64), *range(64, len(data) - 40, 97), *range(len(data) - 40, len(data))}:
        assert status_of(data[:length]) in {ViewStatus.UNDECODABLE, ViewStatus.UNSUPPORTED}


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    start = time.perf_counter()
    assert status_of(png_header(50_000, 50_000), 2**26) == ViewStatus.TOO_LARGE
    assert status_of(IMAGES["jpeg"], 48 * 80 - 1) == ViewStatus.TOO_LARGE
    assert time.perf_counter() - start < 0.1
    decode(IMAGES["jpeg"], 48 * 80)


def test_what_is_no_accepted_image_is_unsupported_or_undecodable() -> None:
    animated = encode(PICTURE, "WEBP", save_all=True, append_images=[PICTURE.rotate(90)])
    for data in (encode(PICTURE, "GIF"), encode(PICTURE, "BMP"), b"<html>404</html>", animated):
        assert status_of(data) == ViewStatus.UNSUPPORTED
    for data in (b"", png_header(0, 5), png_header(5, 5), b"\xff\xd8\xff\xd9", b"RIFF\0\0\0\0WEBPVP8 "):
        assert status_of(data) == ViewStatus.UNDECODABLE


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_damage_raises_image_error_and_nothing_else(data: st.DataObject) -> None:
    damaged = bytearray(IMAGES[data.draw(st.sampled_from(sorted(IMAGES)))])
    for position in data.draw(st.lists(st.integers(0, len(damaged) - 1), max_size=4)):
        damaged[position] ^= 1 << data.draw(st.integers(0, 7))
    start = data.draw(st.integers(0, len(damaged)))
    damaged[start : start + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    with contextlib.suppress(ImageError):
        image = decode(bytes(damaged), LIMIT)
        assert image.shape == (3, *image_size(bytes(damaged), LIMIT))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([b"", *(data[:16] for data in IMAGES.values())]), st.binary(max_size=200))
def test_noise_raises_image_error_and_nothing_else(magic: bytes, noise: bytes) -> None:
    with pytest.raises(ImageError):
        decode(magic + noise, LIMIT)


def test_damage_inside_a_png_is_found() -> None:
    data = bytearray(IMAGES["png"])
    data[data.index(b"IDAT") + 40] ^= 1
    assert status_of(bytes(data)) == ViewStatus.UNDECODABLE


def test_a_cut_at_the_same_resolution_is_the_identity() -> None:
    image = decode(IMAGES["jpeg"], LIMIT)
    assert torch.equal(cut(image, CropBox(0, 0, 48, 80), 48, 80), image)
    assert torch.equal(cut(image, CropBox(3, 7, 20, 31), 20, 31), image[:, 3:23, 7:38])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_cut_depends_on_the_pixels_inside_its_box_only(data: st.DataObject) -> None:
    image = decode(IMAGES["jpeg"], LIMIT)
    top, left = data.draw(st.integers(0, 47)), data.draw(st.integers(0, 79))
    height, width = data.draw(st.integers(1, 48 - top)), data.draw(st.integers(1, 80 - left))
    box = CropBox(top, left, height, width, data.draw(st.booleans()))
    size = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 60))
    other = torch.full_like(image, 255)
    other[:, top : top + height, left : left + width] = image[:, top : top + height, left : left + width]
    view = cut(image, box, *size)
    assert view.shape == (3, *size)
    assert view.dtype == torch.uint8
    assert torch.equal(view, cut(other, box, *size))
    assert torch.equal(view, cut(image.contiguous(), box, *size)), "the memory layout decides nothing"


def test_a_mirrored_cut_is_the_mirror_of_the_cut() -> None:
    image = decode(IMAGES["png"], LIMIT)
    plain, mirrored = (cut(image, CropBox(1, 2, 30, 50, hflip), 14, 21) for hflip in (False, True))
    assert torch.equal(mirrored, plain.flip(-1))
    assert not torch.equal(mirrored, plain)


def test_one_pixel_fills_its_view() -> None:
    image = decode(IMAGES["png"], LIMIT)
    assert torch.equal(cut(image, CropBox(5, 9, 1, 1), 8, 8), image[:, 5:6, 9:10].expand(3, 8, 8))


def test_a_constant_image_stays_constant() -> None:
    image = torch.full((3, 33, 47), 201, dtype=torch.uint8)
    assert (cut(image, CropBox(0, 0, 33, 47), 224, 5) == 201).all()


def test_a_box_that_leaves_the_image_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="48x80"):
        cut(decode(IMAGES["png"], LIMIT), CropBox(40, 0, 9, 5), 8, 8)
