"""What the tests of several families need: pixels, and the package's own normalisation."""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.teachers import Teacher
from storage_schemas.manifest import TeacherSpec

TINY_CLIP = "tiny-clip"

TOLERANCE = 1e-5  # between a teacher and its package called by itself, absolute, fp32


def add_tiny_clip() -> None:
    """Let open_clip know a model that is made in no time, as its users add theirs."""
    import open_clip

    open_clip.add_model_config(Path(__file__).parent / "models" / f"{TINY_CLIP}.json")


def random_images(spec: TeacherSpec, count: int = 2) -> torch.Tensor:
    """uint8 b 3 height width at a teacher's resolution."""
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, spec.height, spec.width), dtype=torch.uint8, generator=generator)


def normalize(images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """As torchvision's ToTensor and Normalize do."""
    shift, scale = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))
    return (images.float() / 255 - shift) / scale


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal within TOLERANCE, and not for want of content."""
    assert found.shape == expected.shape
    assert expected.std() > 1e-3
    assert (found - expected).abs().max() <= TOLERANCE


def assert_half_is_near(single: Teacher, half: Teacher) -> None:
    """Autocast changes digits, not directions."""
    images = random_images(single.spec)
    one, two = single(images), half(images)
    assert two.spatial.dtype == torch.float32
    assert not torch.equal(one.spatial, two.spatial)
    assert (torch.cosine_similarity(one.spatial, two.spatial, dim=-1) > 0.99).all()
    assert (torch.cosine_similarity(one.summary, two.summary, dim=-1) > 0.99).all()
    assert half.spec.fingerprint != single.spec.fingerprint
