"""The same rectangle of the same image that a teacher saw, at any resolution."""

from __future__ import annotations

from hashlib import sha256

import numpy as np
import pyarrow as pa
import torch

from storage_schemas.crops import CropBox
from storage_schemas.errors import DataDamage, UserError
from storage_schemas.objects import RangeReader, open_objects, split_url
from storage_schemas.pixels import ImageError, cut, decode


class CropReplay:
    """Cuts the views of one source shard again, each image checked against its digest. Threads may share it.

    url: of the tar. views: the shard's table, VIEW_SCHEMA.
    """

    def __init__(self, shard: str, url: str, views: pa.Table, max_pixels: int) -> None:
        self.shard = shard
        self._max_pixels = max_pixels
        folder, name = split_url(url)
        try:
            self._tar = RangeReader(open_objects(folder, field=f"data: shard {shard!r}, {url!r}"), name)
            self._tar.size()
        except FileNotFoundError as error:
            raise UserError(f"data: shard {shard!r}: there is no {url!r}") from error
        self._digests = views["digest"].to_pylist()
        self._members = _integers(views, "offset", "nbytes")
        self._boxes = _integers(views, "top", "left", "crop_height", "crop_width", "hflip")

    def crop(self, row: int, resolution: tuple[int, int]) -> torch.Tensor:
        """uint8 3 height width of a view that is ok; DataDamage if the tar is not the one recorded."""
        offset, nbytes = self._members[row].tolist()
        data = self._tar.read(offset, nbytes)
        digest = sha256(data).digest()[:16]
        if digest != self._digests[row]:
            raise DataDamage(
                f"shard {self.shard!r} row {row}: image has digest {digest.hex()}, recorded "
                f"{self._digests[row].hex()}; the tar is not the one that was recorded"
            )
        try:
            image = decode(data, self._max_pixels)
        except ImageError as error:
            raise DataDamage(f"shard {self.shard!r} row {row}: {error}; it was read when recorded") from error
        top, left, height, width, hflip = self._boxes[row].tolist()
        return cut(image, CropBox(top, left, height, width, bool(hflip)), *resolution)


def _integers(views: pa.Table, *columns: str) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """rows columns, 0 where null."""
    return np.stack([views[name].cast(pa.int64()).fill_null(0).to_numpy() for name in columns], axis=1)
