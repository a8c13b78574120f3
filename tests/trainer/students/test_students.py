from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from storage_schemas.errors import UserError
from trainer.students import STUDENTS, create_student, list_students
from trainer.students.base import IMAGENET_MEAN, IMAGENET_STD

SMALL_VIT = {"width": 32, "depth": 2, "heads": 2, "max_size": 64}


@pytest.mark.parametrize("name", sorted(STUDENTS))
def test_registered_students_are_listed_and_described(name: str) -> None:
    assert name in list_students()
    with torch.device("meta"):
        student = create_student(name)
    assert student.grid(448, 224) == (448 // student.patch_size, 224 // student.patch_size)


def test_every_timm_model_is_listed() -> None:
    assert "timm/resnet18" in list_students()


@pytest.mark.parametrize(
    ("model", "size", "settings"),
    [
        ("resnet18", (64, 96), {}),  # b d h w
        ("mobilenetv3_small_050", (64, 96), {}),  # a head wider than its map
        ("test_efficientnet", (65, 97), {}),  # sizes that no stride divides
        ("swin_tiny_patch4_window7_224", (64, 96), {"img_size": (64, 96), "window_size": 2}),  # b h w d
        ("vit_tiny_patch16_224", (64, 96), {"img_size": (64, 96), "depth": 1}),  # one class token
        ("vit_tiny_patch16_224", (64, 96), {"dynamic_img_size": True, "depth": 1}),
        ("deit_tiny_distilled_patch16_224", (64, 96), {"img_size": (64, 96), "depth": 1}),  # two
        ("vit_base_patch16_siglip_224", (64, 96), {"img_size": (64, 96), "depth": 1}),  # none
        ("vit_small_patch14_reg4_dinov2", (56, 84), {"img_size": (56, 84), "depth": 1}),  # registers
        ("mixer_s16_224", (224, 224), {}),  # tokens only
        ("efficientvit_b0", (64, 96), {}),
        ("test_convnext", (64, 96), {}),
    ],
)
def test_timm_models_give_what_they_announce(
    model: str, size: tuple[int, int], settings: dict[str, object]
) -> None:
    student = create_student(f"timm/{model}", **settings).train()
    grid = student.grid(*size)
    assert student.training
    student.eval()
    with torch.no_grad():
        output = student(torch.rand(2, 3, *size))
    assert output.summary.shape == (2, student.summary_dim)
    assert output.spatial.shape == (2, *grid, student.spatial_dim)
    assert grid[0] < grid[1] or size[0] == size[1]


@pytest.mark.parametrize("model", ["resnet18", "vit_tiny_patch16_224"])
def test_timm_grid_is_row_before_column(model: str) -> None:
    """The cell under the part of the image that changed is the one that changes most."""
    torch.manual_seed(0)
    settings = {} if model == "resnet18" else {"img_size": (96, 160), "depth": 1}
    student = create_student(f"timm/{model}", **settings).eval()
    images = torch.zeros(1, 3, 96, 160)
    changed = images.clone()
    changed[:, :, 0:32, 128:160] = torch.rand(3, 32, 32)
    with torch.no_grad():
        difference = (student(images).spatial - student(changed).spatial).norm(dim=-1)[0]  # h w
    row, column = divmod(int(difference.argmax()), difference.shape[1])
    assert row < difference.shape[0] / 3
    assert column >= difference.shape[1] * 4 / 5


def test_asking_for_the_grid_changes_nothing() -> None:
    student = create_student("timm/resnet18").train()
    student.backbone.model.bn1.eval()  # type: ignore[attr-defined]
    before = {name: value.clone() for name, value in student.state_dict().items()}
    modes = [module.training for module in student.modules()]
    student.grid(64, 64)
    assert [module.training for module in student.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_timm_size_that_does_not_fit_is_named() -> None:
    student = create_student("timm/vit_tiny_patch16_224", depth=1)
    with pytest.raises(UserError, match=r"timm/vit_tiny_patch16_224.* 64 x 96"):
        student.grid(64, 96)


def test_sizes_that_do_fit_are_named() -> None:
    with pytest.raises(UserError, match="give multiples of 16"):
        create_student("timm/vit_tiny_patch16_224", img_size=100, depth=1).grid(100, 100)
    with pytest.raises(UserError, match=r"cannot be made for 64 x 96 images; give 224 x 224.*another square"):
        create_student("timm/mvitv2_tiny", resolution=(64, 96))
    with pytest.raises(UserError, match=r"does not take 65 x 65 .* Give 224 x 224"):
        create_student("timm/vit_tiny_patch16_224", depth=1).grid(65, 65)


@pytest.mark.parametrize("model", ["pit_ti_224", "crossvit_tiny_240"])
def test_timm_models_without_one_map_are_refused(model: str) -> None:
    size = 240 if model.startswith("crossvit") else 224
    with pytest.raises(UserError, match=f"timm/{model}"):
        create_student(f"timm/{model}").grid(size, size)


def test_students_normalise_with_their_own_or_the_given_numbers() -> None:
    """An image of the mean colour is zero to the backbone, and its output that of a blank one."""
    colour = (0.1, 0.2, 0.3)
    own = create_student("timm/test_resnet").eval()
    given = create_student("timm/test_resnet", pixel_mean=colour, pixel_std=(1, 1, 1)).eval()
    given.backbone.load_state_dict(own.backbone.state_dict())
    blank = own.backbone(torch.zeros(1, 3, 32, 32)).summary
    for student, mean in ((own, own.pixel_mean), (given, torch.tensor(colour).view(3, 1, 1))):
        torch.testing.assert_close(student(mean.expand(1, 3, 32, 32)).summary, blank)
    vit = create_student("radio_vit_ti16", **SMALL_VIT)
    assert vit.pixel_mean.flatten().tolist() == pytest.approx(IMAGENET_MEAN)
    assert vit.pixel_std.flatten().tolist() == pytest.approx(IMAGENET_STD)


def test_unknown_names_get_the_closest_ones() -> None:
    with pytest.raises(UserError, match=r"'radio_vit_ti61'.*radio_vit_ti16"):
        create_student("radio_vit_ti61")
    with pytest.raises(UserError, match=r"'timm/resnet18b'.*timm/resnet18"):
        create_student("timm/resnet18b")
    for written, meant in (("E-RADIO-B", "eradio_b"), ("RADIO-ViT-L/14", "radio_vit_l14")):
        with pytest.raises(UserError, match=f"the closest are {meant},"):
            create_student(written)
    with pytest.raises(UserError, match=r"there are .*timm/NAME"):
        create_student("?")


@pytest.mark.parametrize("name", ["radio_vit_ti16", "eradio_b", "timm/vit_tiny_patch16_224", "timm/resnet18"])
def test_unknown_settings_are_named(name: str) -> None:
    with pytest.raises(UserError, match="does not take the setting 'colour'"):
        create_student(name, colour="red")


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("radio_vit_ti16", "depth", "two"),
        ("timm/test_vit", "img_size", "abc"),
        ("radio_vit_ti16", "pixel_mean", "abc"),
        ("radio_vit_ti16", "pixel_mean", [0.5, 0.5, "x"]),
        ("radio_vit_ti16", "pixel_std", [0.5, 0.5]),
        ("radio_vit_ti16", "pixel_std", 3),
        ("radio_vit_ti16", "pixel_mean", [0.5, 0.5, float("nan")]),
        ("radio_vit_ti16", "pixel_std", [0.5, 0.5, 0]),
        ("radio_vit_ti16", "pixel_std", [0.5, 0.5, float("inf")]),
    ],
)
def test_wrong_values_are_named(name: str, setting: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"student.*{setting}[:=].*{re.escape(str(value)[1:-1])}"):
        create_student(name, **{setting: value})


def test_impossible_settings_are_named() -> None:
    with pytest.raises(UserError, match="'num_blocks'"):
        create_student("timm/mixer_s16_224", num_blocks=1)  # timm fixes it for this name
    with pytest.raises(UserError, match="pixel_mean"):
        create_student("radio_vit_ti16", **SMALL_VIT, pixel_mean=(0.5,))


def test_a_student_is_a_module_whose_weights_are_its_backbones() -> None:
    student = create_student("radio_vit_ti16", **SMALL_VIT)
    assert isinstance(student, nn.Module)
    assert {name.split(".")[0] for name, _ in student.named_parameters()} == {"backbone"}
