"""From an image's bytes to the pixels of one view: the only code that does so, used by both halves.

Decoders and resizers differ by several levels, so a stored feature fits the pixels that this module makes and
no others; `manifest.PIXELS` names them. Sizes are read from the header by hand, for an image must be refused
before anything allocates its pixels, and because Pillow reports bombs through process-wide warnings.

JPEG and WebP go through torchvision. PNG, where every sound decoder agrees to the bit, goes through Pillow,
stripped to its pixels and with its checksums checked first: torchvision's libpng ends the whole process on a
damaged file.
"""

from __future__ import annotations

import io
import re
import struct
import zlib

import numpy as np
import torch
from PIL.PngImagePlugin import PngImageFile
from torch.nn.functional import interpolate
from torchvision.io import ImageReadMode

from storage_schemas.crops import CropBox
from storage_schemas.views import ViewStatus

_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = frozenset({b"IHDR", b"PLTE", b"IDAT", b"IEND"})
_JPEG_MARKER = re.compile(rb"\xff+([^\x00\xff])")
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_BARE = frozenset({0x01, *range(0xD0, 0xD9)})
_JPEG_DATA = frozenset({0xD9, 0xDA})
_SOURCE_LINE = re.compile(r"^.*?\.(?:cpp|h):\d+, ")


class ImageError(Exception):
    """An image that gives no pixels: `status` says why, and the message is the same on every machine."""

    def __init__(self, status: ViewStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


def image_size(data: bytes, max_pixels: int) -> tuple[int, int]:
    """Height and width from the header, undecoded; ImageError where it is unreadable or promises too much."""
    try:
        height, width = _header_size(data)
    except (struct.error, IndexError) as error:
        raise ImageError(ViewStatus.UNDECODABLE, "the header is incomplete") from error
    if height < 1 or width < 1:
        raise ImageError(ViewStatus.UNDECODABLE, f"the header says {height}x{width} pixels")
    if height * width > max_pixels:
        message = f"the header says {height}x{width} pixels, more than max_pixels {max_pixels}"
        raise ImageError(ViewStatus.TOO_LARGE, message)
    return height, width


def decode(data: bytes, max_pixels: int) -> torch.Tensor:
    """RGB pixels, uint8, 3 height width, EXIF rotation ignored; raises ImageError and nothing else.

    Gray, palette, CMYK and 16-bit images become 8-bit RGB; alpha is dropped. An incomplete file is an error.
    """
    size = image_size(data, max_pixels)
    image = _decode_png(data) if data.startswith(_PNG) else _decode_torchvision(data)  # 3 height width
    if image.shape != (3, *size) or image.dtype != torch.uint8:
        found = "x".join(str(side) for side in image.shape)
        message = f"the header says {size[0]}x{size[1]} pixels, decoding gave {found}"
        raise ImageError(ViewStatus.UNDECODABLE, message)
    return image


def cut(image: torch.Tensor, box: CropBox, height: int, width: int) -> torch.Tensor:
    """The view `box` of `image` (uint8 3 rows columns) at `height` by `width`: crop, one resize, mirror.

    Antialiased bicubic on uint8. Nothing outside the box has any weight.
    """
    rows, columns = image.shape[-2:]
    assert 0 <= box.top < box.top + box.height <= rows, f"{box} leaves an image of {rows}x{columns}"
    assert 0 <= box.left < box.left + box.width <= columns, f"{box} leaves an image of {rows}x{columns}"
    crop = image[:, box.top : box.top + box.height, box.left : box.left + box.width]
    crop = crop.unsqueeze(0).contiguous(memory_format=torch.channels_last)  # 1 3 crop_height crop_width
    view = interpolate(crop, size=(height, width), mode="bicubic", antialias=True)[0]  # 3 height width
    return view.flip(-1) if box.hflip else view


def _decode_torchvision(data: bytes) -> torch.Tensor:
    # A copy, because torch warns of a tensor over read-only bytes; it costs a hundredth of the decoding.
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    try:
        # The operator itself: its wrapper, torchvision.io.decode_image, warns at every call since 0.29.
        image: torch.Tensor = torch.ops.image.decode_image(encoded, ImageReadMode.RGB.value, False)
    except RuntimeError as error:
        raise ImageError(ViewStatus.UNDECODABLE, _first_line(error)) from error
    return image


def _decode_png(data: bytes) -> torch.Tensor:
    try:
        picture = PngImageFile(io.BytesIO(_png_pixel_chunks(data)))
        picture.load()
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:
        raise ImageError(ViewStatus.UNDECODABLE, "the PNG's pixels cannot be decoded") from error
    if picture.mode.startswith("I"):  # 16-bit gray; Pillow itself halves 16-bit colour to its high bytes
        gray = (np.array(picture) >> 8).astype(np.uint8)
        pixels = np.repeat(gray[:, :, None], 3, axis=2)
    else:
        pixels = np.array(picture.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _png_pixel_chunks(data: bytes) -> bytes:
    """The PNG without its metadata, every checksum of what remains checked up to the end chunk."""
    position, view = len(_PNG), memoryview(data)
    kept: list[bytes | memoryview] = [_PNG]
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if kind in _PNG_PIXELS:
            chunk, checksum = view[position : end - 4], view[end - 4 : end]
            if end > len(data) or zlib.crc32(chunk[4:]) != int.from_bytes(checksum):
                raise ImageError(ViewStatus.UNDECODABLE, f"the PNG's {kind.decode()} chunk is damaged")
            kept += [chunk, checksum]
            if kind == b"IEND":
                return b"".join(kept)
        position = end
    raise ImageError(ViewStatus.UNDECODABLE, "the PNG is incomplete")


def _header_size(data: bytes) -> tuple[int, int]:
    if data.startswith(_JPEG):
        return _jpeg_size(data)
    if data.startswith(_PNG):
        return _png_size(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp_size(data)
    if not data:
        raise ImageError(ViewStatus.UNDECODABLE, "the file is empty")
    raise ImageError(ViewStatus.UNSUPPORTED, "neither JPEG, PNG nor WebP")


def _png_size(data: bytes) -> tuple[int, int]:
    kind, width, height = struct.unpack_from(">4sII", data, 12)
    if kind != b"IHDR":
        raise ImageError(ViewStatus.UNDECODABLE, "the PNG does not begin with its header")
    return height, width


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """Of the first frame header, with libjpeg's rules for what may stand between two markers."""
    position = 2
    while (match := _JPEG_MARKER.search(data, position)) is not None:
        marker, position = match[1][0], match.end()
        if marker in _JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", data, position + 3)
            return height, width
        if marker in _JPEG_DATA:
            break
        if marker not in _JPEG_BARE:
            position += max(2, struct.unpack_from(">H", data, position)[0])
    raise ImageError(ViewStatus.UNDECODABLE, "the JPEG has no frame header")


def _webp_size(data: bytes) -> tuple[int, int]:
    kind = data[12:16]
    if kind == b"VP8X":
        if data[20] & 2:
            raise ImageError(ViewStatus.UNSUPPORTED, "an animated WebP")
        canvas = struct.unpack_from("<6B", data, 24)
        return _uint24(*canvas[3:]) + 1, _uint24(*canvas[:3]) + 1
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return height & 0x3FFF, width & 0x3FFF
    raise ImageError(ViewStatus.UNDECODABLE, "the WebP has no image")


def _uint24(low: int, middle: int, high: int) -> int:
    return low | middle << 8 | high << 16


def _first_line(error: RuntimeError) -> str:
    """The decoder's own sentence, without the source line that differs between builds."""
    lines = _SOURCE_LINE.sub("", str(error)).splitlines()
    return lines[0][:200] if lines else "the decoder gave no reason"
