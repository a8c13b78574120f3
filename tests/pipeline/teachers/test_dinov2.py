from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch.nn import functional

from pipeline.teachers import create_teacher, outline_teacher
from pipeline.teachers.timm import extract_features
from storage_schemas.errors import UserError
from storage_schemas.features import pack
from tests.pipeline.teachers.upstream import assert_half_is_near, assert_near, normalize, random_images

PLAIN, REGISTERS = "vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

State = dict[str, torch.Tensor]


def teacher(model: str, **settings: Any) -> Any:
    weights = {"weights": "random", "seed": 0} if "weights" not in settings else {}
    return create_teacher("timm", model, **{"device": "cpu", **weights, **settings})


@pytest.mark.parametrize("resolution", [224, 280])
@pytest.mark.parametrize(("model", "registers"), [(PLAIN, 0), (REGISTERS, 4)])
def test_features_are_timm_s_and_dinov2_s_normed_tokens(model: str, registers: int, resolution: int) -> None:
    """DINOv2's x_norm_clstoken is token 0 of the final norm, x_norm_patchtokens those after the registers."""
    found = teacher(model, resolution=resolution)
    images = random_images(found.spec, 1)
    torch.manual_seed(0)
    network: Any = timm.create_model(model, num_classes=0, img_size=resolution).eval()
    before: list[torch.Tensor] = []
    network.norm.register_forward_pre_hook(lambda _, args: before.append(args[0]))
    with torch.no_grad():
        features = network.forward_features(normalize(images, *IMAGENET))
        normed = functional.layer_norm(before[0], (384,), network.norm.weight, network.norm.bias, 1e-6)
    output = found(images)
    assert_near(output.summary, features[:, 0])
    assert_near(output.summary, normed[:, 0])
    assert_near(output.spatial.flatten(1, 2), features[:, 1 + registers :])
    assert_near(output.spatial.flatten(1, 2), normed[:, 1 + registers :])
    packed = pack(output)
    assert (torch.from_numpy(packed.spatial) == output.spatial.half()).all()
    side = resolution // 14
    assert (found.spec.grid.height, found.spec.patch_size, found.spec.summary) == (side, 14, "cls")


def original_state(registers: int) -> State:
    """A checkpoint of ViT-S/14 with the names and shapes that DINOv2's authors publish."""
    generator = torch.Generator().manual_seed(registers)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.05

    d = 384
    state = {"cls_token": random(1, 1, d), "pos_embed": random(1, 37 * 37 + 1, d), "mask_token": random(1, d)}
    if registers:
        state["register_tokens"] = random(1, registers, d)
    state |= {"patch_embed.proj.weight": random(d, 3, 14, 14), "patch_embed.proj.bias": random(d)}
    for block in range(12):
        linear = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.fc1": (4 * d, d), "mlp.fc2": (d, 4 * d)}
        for name, shape in linear.items():
            state[f"blocks.{block}.{name}.weight"] = random(*shape)
            state[f"blocks.{block}.{name}.bias"] = random(shape[0])
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"):
            state[f"blocks.{block}.{name}"] = random(d)
    return {**state, "norm.weight": 1 + random(d), "norm.bias": random(d)}


def original_forward(state: State, pixels: torch.Tensor, blocks: int) -> torch.Tensor:
    """Normed tokens as DINOv2 defines them, on images of its own 518 pixels: b (1 + registers + h w) d."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.layer_norm(x, (384,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def patches() -> torch.Tensor:
        weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
        return functional.conv2d(pixels, weight, bias, stride=14).flatten(2).transpose(1, 2)  # b (h w) d

    b = len(pixels)
    x = torch.cat([state["cls_token"].expand(b, -1, -1), patches()], 1) + state["pos_embed"]
    if "register_tokens" in state:
        x = torch.cat([x[:, :1], state["register_tokens"].expand(b, -1, -1), x[:, 1:]], 1)
    for block in (f"blocks.{i}" for i in range(blocks)):
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv")
        q, k, v = qkv.unflatten(2, (3, 6, 64)).permute(2, 0, 3, 1, 4)  # b heads tokens 64
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + linear(mixed, f"{block}.attn.proj") * state[f"{block}.ls1.gamma"]
        hidden = functional.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
        x = x + linear(hidden, f"{block}.mlp.fc2") * state[f"{block}.ls2.gamma"]
    return norm(x, "norm")


@pytest.mark.parametrize(("model", "registers"), [(PLAIN, 0), (REGISTERS, 4)])
def test_the_authors_own_checkpoints_load(model: str, registers: int, tmp_path: Path) -> None:
    state = original_state(registers)
    torch.save(state, tmp_path / "dinov2_vits14_pretrain.pth")
    path = str(tmp_path / "dinov2_vits14_pretrain.pth")
    found = teacher(model, weights=path, blocks=2)
    images = random_images(found.spec, 1)
    tokens = original_forward(state, normalize(images, *IMAGENET), blocks=2)
    output = found(images)
    assert_near(output.summary, tokens[:, 0])
    assert_near(output.spatial.flatten(1, 2), tokens[:, 1 + registers :])
    small = teacher(model, weights=path, blocks=2, resolution=224)
    assert small(random_images(small.spec, 1)).spatial.shape == (1, 16, 16, 384)


def test_a_checkpoint_without_registers_is_not_one_with(tmp_path: Path) -> None:
    torch.save(original_state(0), tmp_path / "plain.pth")
    with pytest.raises(UserError, match=re.escape(f"'plain.pth' is not of {REGISTERS!r}: ")):
        teacher(REGISTERS, weights=str(tmp_path / "plain.pth"))


@pytest.mark.parametrize(
    ("model", "prefix", "resolution", "patch"),
    [
        ("vit_small_patch16_dinov3", 5, 160, 16),
        ("vit_tiny_patch16_224", 1, 224, 16),
        ("vit_small_patch14_reg4_dinov2", 5, 140, 14),
        ("vit_medium_patch16_gap_256", 0, 256, 16),
    ],
)
def test_as_many_prefix_tokens_are_dropped_as_the_model_has(
    model: str, prefix: int, resolution: int, patch: int
) -> None:
    settings = {} if resolution in (224, 256) else {"img_size": resolution}
    torch.manual_seed(0)
    network: Any = timm.create_model(model, num_classes=0, **settings).eval()
    network.blocks = network.blocks[:2]
    pixels = torch.randn(1, 3, resolution, resolution)
    with torch.no_grad():
        tokens = network.forward_features(pixels)
        spatial = extract_features(network, pixels, "mean").spatial
    side = resolution // patch
    assert tokens.shape[1] == prefix + side * side
    assert torch.equal(spatial.flatten(1, 2), tokens[:, prefix:])


def test_half_precision_is_near_single() -> None:
    settings: dict[str, Any] = {"resolution": 140, "blocks": 3}
    single, half = (teacher(PLAIN, compute_dtype=dtype, **settings) for dtype in ("float32", "bfloat16"))
    assert_half_is_near(single, half)


def test_a_resolution_that_the_patches_do_not_divide_is_refused_naming_both() -> None:
    with pytest.raises(
        UserError, match=f"resolution: 225x225 is no multiple of 14, the patch size of '{PLAIN}'"
    ):
        teacher(PLAIN, resolution=225)


@pytest.mark.parametrize(("size", "width"), [("small", 384), ("base", 768), ("large", 1024), ("giant", 1536)])
@pytest.mark.parametrize("registers", ["", "_reg4"])
def test_all_four_sizes_have_the_paper_s_grid_and_widths(size: str, width: int, registers: str) -> None:
    spec = outline_teacher("timm", f"vit_{size}_patch14{registers}_dinov2.lvd142m", resolution=224).spec
    assert (spec.grid.height, spec.summary_dim, spec.spatial_dim) == (16, width, width)
