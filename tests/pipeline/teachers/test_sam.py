from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.recorder import Recorder
from pipeline.teachers import create_teacher, outline_teacher
from pipeline.teachers.sam import load_sam_decoder
from storage_schemas.crops import CropBox, CropPolicy
from storage_schemas.errors import UserError
from storage_schemas.features import pack
from storage_schemas.manifest import StoreManifest
from storage_schemas.pixels import cut, decode
from storage_schemas.store import FeatureStore
from tests.conftest import MakeJpeg, WriteTar
from tests.pipeline.teachers.upstream import assert_half_is_near, assert_near, random_images

segment_anything = pytest.importorskip("segment_anything")


@pytest.fixture(scope="module")
def upstream() -> Any:
    """A SAM ViT-B whose position embeddings are not zero, as they are before training."""
    torch.manual_seed(0)
    sam = segment_anything.sam_model_registry["vit_b"]()
    for name, parameter in sam.image_encoder.named_parameters():
        if "pos" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return sam.requires_grad_(False)


@pytest.fixture(scope="module")
def checkpoint(upstream: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("weights") / "sam_vit_b.pth"
    torch.save(upstream.state_dict(), path)
    return path


def teacher(checkpoint: Path, **settings: Any) -> Any:
    return create_teacher("sam", "vit_b", weights=f"file:{checkpoint}", **{"device": "cpu", **settings})


def encode(sam: Any, images: torch.Tensor, blocks: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Features before the neck, b h w d, and after it, b 256 h w, by the package's own modules.

    Its relative position embeddings resample themselves; its absolute ones are resampled here.
    """
    encoder = sam.image_encoder
    x = encoder.patch_embed((images.float() - sam.pixel_mean) / sam.pixel_std)  # b h w d
    positions = encoder.pos_embed.permute(0, 3, 1, 2)
    if x.shape[1:3] != positions.shape[2:]:
        positions = torch.nn.functional.interpolate(positions, x.shape[1:3], mode="bicubic", antialias=True)
    x = x + positions.permute(0, 2, 3, 1)
    for block in encoder.blocks[:blocks]:
        x = block(x)
    return x, encoder.neck(x.permute(0, 3, 1, 2))


def test_at_its_own_resolution_the_encoder_is_segment_anything_s(upstream: Any, checkpoint: Path) -> None:
    found = teacher(checkpoint, blocks=3)  # of which the last attends globally
    images = random_images(found.spec, 1)
    before: list[torch.Tensor] = []
    blocks = upstream.image_encoder.blocks
    upstream.image_encoder.blocks = blocks[:3]
    hook = upstream.image_encoder.neck.register_forward_pre_hook(lambda _, args: before.append(args[0]))
    after = upstream.image_encoder(upstream.preprocess(images))
    hook.remove()
    upstream.image_encoder.blocks = blocks
    output = found(images)
    assert_near(output.spatial, before[0].permute(0, 2, 3, 1))
    assert_near(output.summary, before[0].mean((2, 3)))
    neck = load_sam_decoder("vit_b", str(checkpoint)).neck
    assert_near(
        neck(output.spatial.permute(0, 3, 1, 2).contiguous()), after
    )  # in the layout that the encoder has
    packed = pack(output)
    assert (torch.from_numpy(packed.spatial) == output.spatial.half()).all()
    spec = found.spec
    assert (spec.height, spec.grid.height, spec.spatial_dim, spec.summary) == (1024, 64, 768, "mean")


def test_at_half_of_it_the_position_embeddings_are_resampled(upstream: Any, checkpoint: Path) -> None:
    images = random_images(outline_teacher("sam", "vit_b", resolution=512).spec, 1)
    before, after = encode(upstream, images)
    for spatial, expected in (("backbone", before), ("neck", after.permute(0, 2, 3, 1))):
        found = teacher(checkpoint, resolution=512, spatial=spatial)
        output = found(images)
        assert_near(output.spatial, expected)
        assert_near(output.summary, expected.mean((1, 2)))
        assert (found.spec.spatial, found.spec.grid.height) == (spatial, 32)


def test_the_first_blocks_alone_on_images_that_are_not_square(upstream: Any, checkpoint: Path) -> None:
    found = teacher(checkpoint, resolution=(160, 256), blocks=3)
    images = random_images(found.spec)
    assert_near(found(images).spatial, encode(upstream, images, blocks=3)[0])
    assert (found.spec.grid.height, found.spec.grid.width, found.spec.blocks) == (10, 16, 3)


def test_the_side_of_the_neck_is_in_the_fingerprint(checkpoint: Path) -> None:
    before, after = (
        outline_teacher("sam", "vit_b", spatial=spatial).spec for spatial in ("backbone", "neck")
    )
    assert before.fingerprint != after.fingerprint
    assert (before.spatial_dim, after.spatial_dim) == (768, 256)
    assert before.spatial == outline_teacher("sam", "vit_b").spec.spatial


def test_the_parts_of_the_decoder_are_those_of_the_checkpoint(upstream: Any, checkpoint: Path) -> None:
    decoder = load_sam_decoder("vit_b", f"file:{checkpoint}")
    pairs = (
        (decoder.neck, upstream.image_encoder.neck),
        (decoder.prompt_encoder, upstream.prompt_encoder),
        (decoder.mask_decoder, upstream.mask_decoder),
    )
    for found, expected in pairs:
        state = found.state_dict()
        assert state.keys() == expected.state_dict().keys()
        assert all(torch.equal(state[name], value) for name, value in expected.state_dict().items())
        assert not found.training
        assert not any(parameter.requires_grad for parameter in found.parameters())


@pytest.mark.parametrize("spatial", ["backbone", "neck"])
def test_sam_predictor_gives_its_own_masks_on_features_read_back(
    upstream: Any,
    checkpoint: Path,
    tmp_path: Path,
    write_tar: WriteTar,
    jpeg: MakeJpeg,
    spatial: str,
) -> None:
    data = jpeg(3, 300, 400)
    tar = write_tar(tmp_path / "a.tar", [{"__key__": "0", "jpg": data}])
    store = FeatureStore.create(str(tmp_path / "store"), StoreManifest(crops=CropPolicy(kind="whole")))
    recorded = teacher(checkpoint, spatial=spatial, blocks=2, name="sam")
    assert not Recorder(store, [recorded], batch_size=1, decode_threads=1).record("a", str(tar)).error
    stored = torch.from_numpy(np.asarray(store.part("sam", "a").spatial[...])).float().permute(0, 3, 1, 2)
    if spatial == "backbone":
        stored = load_sam_decoder("vit_b", str(checkpoint)).neck(stored)
    blocks = upstream.image_encoder.blocks
    upstream.image_encoder.blocks = blocks[:2]
    predictor = segment_anything.SamPredictor(upstream)
    image = decode(data, 2**24)
    predictor.set_torch_image(cut(image, CropBox(0, 0, 300, 400), 1024, 1024)[None], (1024, 1024))
    upstream.image_encoder.blocks = blocks
    prompt = {"box": np.array([200, 300, 700, 800]), "multimask_output": True, "return_logits": True}
    logits, quality, _ = predictor.predict(**prompt)
    predictor.features = stored
    again, quality_again, _ = predictor.predict(**prompt)
    scale = np.abs(logits).max()
    print(
        f"{spatial}: logits differ by {np.abs(again - logits).max() / scale:.2e} of their largest, "
        f"{((again > 0) != (logits > 0)).mean():.2e} of mask pixels, quality by "
        f"{np.abs(quality_again - quality).max():.2e}"
    )
    assert scale > 1e-3
    assert np.abs(again - logits).max() < 0.01 * scale
    assert ((again > 0) != (logits > 0)).mean() < 1e-3
    assert np.abs(quality_again - quality).max() < 1e-3


def test_half_precision_is_near_single(checkpoint: Path) -> None:
    settings: dict[str, Any] = {"resolution": 256, "blocks": 3}
    single, half = (teacher(checkpoint, compute_dtype=dtype, **settings) for dtype in ("float32", "bfloat16"))
    assert_half_is_near(single, half)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "vit_x"}, "segment_anything has no 'vit_x'; close names: vit_"),
        ({"resolution": 1000}, "resolution: 1000x1000 is no multiple of 16, the patch size of 'vit_b'"),
        ({"spatial": "head"}, "spatial"),
        ({"summary": "cls"}, "summary"),
        ({"blocks": 13}, "blocks: 13: 'vit_b' has 12"),
        ({"seed": None}, "seed: is missing"),
        ({"weights": "file:nowhere.pth", "seed": None}, "there is no file"),
        ({"weights": "hub:mine", "seed": None}, "whose own are 'hub:sam_vit_b_01ec64.pth'"),
    ],
)
def test_what_cannot_be_used_is_named_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        create_teacher("sam", **{"model": "vit_b", "weights": "random", "seed": 0, **settings})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_size_is_refused_with_the_first_differences(checkpoint: Path) -> None:
    with pytest.raises(
        UserError, match=r"not of 'vit_l': missing image_encoder\.blocks\.12\.\S+ 1024; .* not "
    ):
        create_teacher("sam", "vit_l", weights=str(checkpoint))


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_one_differing_tensor_is_enough_to_refuse(upstream: Any, tmp_path: Path, change: str) -> None:
    state = dict(upstream.state_dict())
    name = "mask_decoder.iou_token.weight"
    if change == "missing":
        del state[name]
    elif change == "unexpected":
        state["extra"] = torch.zeros(3)
    else:
        state[name] = torch.zeros(2, 256)
    torch.save(state, tmp_path / "other.pth")
    wanted = {"missing": f"missing {name} 1x256", "unexpected": "unexpected extra 3"}
    for load in (load_sam_decoder, lambda model, weights: create_teacher("sam", model, weights=weights)):
        with pytest.raises(UserError) as caught:
            load("vit_b", str(tmp_path / "other.pth"))
        assert wanted.get(change, f"{name} is 2x256, not 1x256") in str(caught.value)


def test_a_truncated_checkpoint_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "half.pth"
    path.write_bytes(checkpoint.read_bytes()[: 10**7])
    with pytest.raises(UserError, match=r"weights: 'half\.pth' cannot be read"):
        create_teacher("sam", "vit_b", weights=str(path))


class Attack:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("attacked"),))


def test_a_pickle_that_needs_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Attack()}, "evil.pth")
    with pytest.raises(UserError, match=r"'evil\.pth' is damaged or would run code"):
        create_teacher("sam", "vit_b", weights="evil.pth")
    assert not Path("attacked").exists()


def test_without_a_network_the_error_says_what_to_fetch_and_where_to_put_it(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(url: str, place: str, **settings: Any) -> None:
        raise OSError("offline")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    place = tmp_path / "checkpoints" / "sam_vit_b_01ec64.pth"
    with pytest.raises(UserError) as caught:
        create_teacher("sam", "vit_b", weights="hub")
    assert "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_b_01ec64.pth" in str(caught.value)
    assert str(place) in str(caught.value)
    place.hardlink_to(checkpoint)
    spec = create_teacher("sam", "vit_b", weights="hub", resolution=64, blocks=1).spec
    assert spec.weights == "hub:sam_vit_b_01ec64.pth"


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "segment_anything", None)
    with pytest.raises(UserError, match=r"pip install 'rebroadcast\[sam\]'"):
        create_teacher("sam", "vit_b", weights="random", seed=0)
