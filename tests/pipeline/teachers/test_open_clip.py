from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pipeline.teachers import create_teacher, outline_teacher
from pipeline.teachers import open_clip as family
from storage_schemas.errors import UserError
from storage_schemas.features import pack
from tests.pipeline.teachers.upstream import (
    TINY_CLIP,
    add_tiny_clip,
    assert_half_is_near,
    assert_near,
    normalize,
    random_images,
)

open_clip = pytest.importorskip("open_clip")

SMALL = TINY_CLIP
add_tiny_clip()


@functools.lru_cache(maxsize=2)
def upstream(model: str, seed: int = 0, **settings: Any) -> Any:
    torch.manual_seed(seed)
    return open_clip.create_model(model, **settings).eval()


def teacher(model: str, **settings: Any) -> Any:
    weights = {"weights": "random", "seed": 0} if "weights" not in settings else {}
    return create_teacher("open_clip", model, **{"device": "cpu", **weights, **settings})


def pixels(images: torch.Tensor) -> torch.Tensor:
    return normalize(images, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_file(upstream(SMALL).state_dict(), path)
    return path


@pytest.mark.parametrize("model", ["ViT-B-32", "ViT-S-32-alt"])
def test_a_vit_gives_open_clip_s_own_embedding_and_normed_tokens(model: str) -> None:
    found = teacher(model)
    images = random_images(found.spec)
    output, network = found(images), upstream(model)
    with torch.no_grad():
        assert_near(output.summary, network.encode_image(pixels(images)))
        network.visual.output_tokens = True
        _, tokens = network.visual(pixels(images))
        network.visual.output_tokens = False
    assert_near(output.spatial.flatten(1, 2), tokens)
    assert found.spec.summary == "projected"
    packed = pack(output)
    assert (torch.from_numpy(packed.spatial) == output.spatial.half()).all()
    assert (torch.from_numpy(packed.summary) == output.summary.half()).all()


def test_a_resnet_gives_its_last_map_and_its_pooled_embedding() -> None:
    network = upstream("RN50")
    found = teacher("RN50")
    images = random_images(found.spec)
    output = found(images)
    with torch.no_grad():
        visual, x = network.visual, pixels(images)
        for stage in (visual.stem, visual.layer1, visual.layer2, visual.layer3, visual.layer4):
            x = stage(x)
        assert_near(output.summary, network.encode_image(pixels(images)))
    assert_near(output.spatial, x.permute(0, 2, 3, 1))
    assert (found.spec.patch_size, found.spec.grid.height) == (32, 7)


TOWERS = {
    # Pooled by attention and not projected, as SigLIP.
    "attention": {"timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none", "embed_dim": 64},
    "convolutions": {"timm_model_name": "test_convnext", "timm_pool": "avg", "timm_proj": "linear"},
}


@pytest.mark.parametrize("tower", TOWERS)
def test_towers_of_timm_give_the_embedding_and_the_trunk_s_features(tower: str, tmp_path: Path) -> None:
    vision = dict(TOWERS[tower])
    config = {"embed_dim": vision.pop("embed_dim", 32), "custom_text": True}
    text = {"context_length": 8, "vocab_size": 100, "width": 64, "heads": 2, "layers": 1}
    model = f"tower-{tower}"
    path = tmp_path / f"{model}.json"
    path.write_text(json.dumps({**config, "vision_cfg": {**vision, "image_size": 160}, "text_cfg": text}))
    open_clip.add_model_config(path)
    found, network = teacher(model), upstream(model)
    images = random_images(found.spec, 1)
    output = found(images)
    shown = normalize(images, found.spec.pixel_mean, found.spec.pixel_std)
    with torch.no_grad():
        assert_near(output.summary, network.encode_image(shown))
        features = network.visual.trunk.forward_features(shown)
    prefix = getattr(network.visual.trunk, "num_prefix_tokens", 0)
    expected = features[:, prefix:] if features.ndim == 3 else features.flatten(2).transpose(1, 2)
    assert_near(output.spatial.flatten(1, 2), expected)


def test_the_class_token_and_its_projection_may_both_be_recorded() -> None:
    projected, cls = teacher(SMALL), teacher(SMALL, summary="cls", name="small_cls")
    images = random_images(projected.spec)
    one, two = projected(images), cls(images)
    assert_near(two.summary @ upstream(SMALL).visual.proj.detach(), one.summary)
    assert torch.equal(one.spatial, two.spatial)
    assert (cls.spec.summary, cls.spec.summary_dim, projected.spec.summary_dim) == ("cls", 64, 32)
    assert cls.spec.weights_sha256 == projected.spec.weights_sha256


def test_position_embeddings_are_resampled_to_another_resolution(small_file: Path) -> None:
    found = teacher(SMALL, weights=str(small_file), resolution=(160, 288))
    network = upstream(SMALL, 1, pretrained=str(small_file), force_image_size=(160, 288))
    images = random_images(found.spec)
    with torch.no_grad():
        assert_near(found(images).summary, network.encode_image(pixels(images)))
    assert (found.spec.grid.height, found.spec.grid.width) == (10, 18)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_file_gives_the_weights_that_it_holds(small_file: Path, tmp_path: Path, suffix: str) -> None:
    path = small_file
    if suffix == ".pt":
        path = tmp_path / "small.pt"  # as training saves it
        state = {f"module.{name}": tensor for name, tensor in upstream(SMALL).state_dict().items()}
        torch.save({"state_dict": state, "epoch": 1}, path)
    found = teacher(SMALL, weights=f"file:{path}")
    images = random_images(found.spec)
    assert torch.equal(found(images).summary, teacher(SMALL)(images).summary)
    assert found.spec.weights == f"file:{path}"


def test_only_the_first_blocks_are_kept_where_a_small_stand_in_is_asked_for() -> None:
    found = teacher(SMALL, blocks=2)
    assert found.spec.blocks == 2
    images = random_images(found.spec)
    network = upstream(SMALL)
    with torch.no_grad():
        _, layers = network.visual.transformer.forward_intermediates(network.visual._embeds(pixels(images)))
        expected = network.visual.ln_post(layers[1])[:, 1:]
    assert_near(found(images).spatial.flatten(1, 2), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near_single(dtype: str) -> None:
    assert_half_is_near(teacher(SMALL), teacher(SMALL, compute_dtype=dtype))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "ViT-B32"}, "open_clip has no 'ViT-B32'; close names: ViT-B-32"),
        ({"resolution": 225}, "resolution: 225x225 is no multiple of 16, the patch size of 'tiny-clip'"),
        ({"model": "ViT-B-16-SigLIP", "resolution": 230}, "230x230 is no multiple of 16, the patch size"),
        ({"model": "RN50", "resolution": 288}, "resolution: 'RN50' takes only 224x224"),
        ({"model": "RN50", "summary": "cls"}, "summary: 'RN50' has no class token of its own"),
        ({"model": "RN50", "blocks": 2}, "blocks: 2: 'RN50' has no list of transformer blocks"),
        ({"blocks": 13}, "blocks: 13: 'tiny-clip' has 3"),
        ({"summary": "mean"}, "summary"),
        ({"colour": 1}, "colour: unknown key"),
        ({"seed": None}, "seed: is missing"),
        ({"weights": "hub", "seed": None}, "'hub:' is no pretrained tag of 'tiny-clip'; there are: none"),
        ({"model": "ViT-B-32", "weights": "hub:laion", "seed": None}, "there are: openai, laion400m_e31"),
        ({"model": "ViT-H-14", "weights": "hub:dfn5b", "seed": None}, "take 'ViT-H-14-quickgelu'"),
        ({"model": "ViT-L-14"}, "give pixel_mean and pixel_std"),
    ],
)
def test_what_cannot_be_used_is_named_in_one_line(settings: dict[str, Any], message: str) -> None:
    if settings.get("weights") == "hub:dfn5b":
        assert "dfn5b" in open_clip.list_pretrained_tags_by_model("ViT-H-14-quickgelu")
    with pytest.raises(UserError) as caught:
        teacher(**{"model": SMALL, "weights": "random", "seed": 0, **settings})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_architecture_is_refused_with_the_first_differences(small_file: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"missing visual\.transformer\.resblocks\.3\.\S+ 768; .* is 77x32, not 77x512",
    ):
        teacher("ViT-B-32", weights=str(small_file))


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_one_differing_tensor_is_enough_to_refuse(small_file: Path, tmp_path: Path, change: str) -> None:
    state = dict(upstream(SMALL).state_dict())
    if change == "missing":
        del state["visual.proj"]
    elif change == "unexpected":
        state["visual.extra"] = torch.zeros(3)
    else:
        state["visual.proj"] = torch.zeros(3, 5)
    save_file(state, tmp_path / "other.safetensors")
    wanted = {"missing": "missing visual.proj 64x32", "unexpected": "unexpected visual.extra 3"}
    with pytest.raises(UserError) as caught:
        teacher(SMALL, weights=str(tmp_path / "other.safetensors"))
    assert wanted.get(change, "visual.proj is 3x5, not 64x32") in str(caught.value)


def test_a_damaged_or_truncated_file_is_refused(small_file: Path, tmp_path: Path) -> None:
    data = small_file.read_bytes()
    path = tmp_path / "damaged.safetensors"
    for content in (b"", data[: len(data) // 2], b"x" * 1000):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"weights: 'damaged\.safetensors' cannot be read"):
            teacher(SMALL, weights=str(path))


class Attack:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("attacked"),))


def test_a_pickle_that_needs_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Attack()}, "evil.pt")
    with pytest.raises(UserError, match=r"'evil\.pt' is damaged or would run code"):
        teacher(SMALL, weights="evil.pt")
    assert not Path("attacked").exists()


def test_an_unreachable_hub_says_what_to_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(config: dict[str, Any]) -> str:
        raise FileNotFoundError("offline")

    monkeypatch.setattr(open_clip, "download_pretrained", offline)
    with pytest.raises(UserError) as caught:
        teacher("ViT-H-14", weights="hub:laion2b_s32b_b79k")
    assert "https://huggingface.co/laion/CLIP-ViT-H-14-laion2B-s32B-b79K/resolve/main/" in str(caught.value)
    assert "weights: file:PATH" in str(caught.value)


def test_the_hub_s_file_is_loaded_like_any_other(small_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"hf_hub": "owner/name/", "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda model: ["mine"])
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda model, tag: config)
    monkeypatch.setattr(open_clip, "download_pretrained", lambda config: str(small_file))
    spec = teacher(SMALL, weights="hub:mine").spec
    assert (spec.weights, spec.pixel_mean, spec.pixel_std) == ("hub:mine", config["mean"], config["std"])
    monkeypatch.setattr(family, "try_to_load_from_cache", lambda repository, name: str(small_file))
    assert family.find_cached(SMALL, "mine") == small_file


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(UserError, match=r"pip install 'rebroadcast\[clip\]'"):
        teacher(SMALL)


@pytest.mark.parametrize(
    ("model", "grid", "summary", "spatial"),
    [
        ("ViT-H-14", 16, 1024, 1280),
        ("ViT-H-14-quickgelu", 16, 1024, 1280),
        ("ViT-L-14-336-quickgelu", 24, 768, 1024),
        ("ViT-H-14-378-quickgelu", 27, 1024, 1280),
        ("ViT-SO400M-14-SigLIP-384", 27, 1152, 1152),
    ],
)
def test_the_paper_s_teachers_have_its_grids_and_widths(
    model: str, grid: int, summary: int, spatial: int
) -> None:
    spec = outline_teacher("open_clip", model).spec
    assert (spec.grid.height, spec.summary_dim, spec.spatial_dim) == (grid, summary, spatial)
    assert spec.pixel_mean == ((0.5, 0.5, 0.5) if "SigLIP" in model else open_clip.OPENAI_DATASET_MEAN)
