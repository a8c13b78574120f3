"""Any timm model as a student, by what timm itself says of the model.

The last feature map is `forward_features`: b d h w, b h w d where the model declares NHWC, or tokens, whose
first few may belong to no patch. The summary is what the model's own classifier would see (`forward_head`,
`pre_logits`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from storage_schemas.errors import UserError
from trainer.students.base import StudentOutput


class TimmBackbone(nn.Module):
    """timm's `model` without its classifier; `settings` (img_size, pretrained...) are `create_model`'s.

    resolution: height and width that a family of fixed size is made for, if no img_size says otherwise.
    """

    def __init__(self, model: str, resolution: tuple[int, int] | None = None, **settings: Any) -> None:
        super().__init__()
        self.name = model
        self.model = _create_at(model, resolution, settings)
        self.patch_size: int = self.model.feature_info[-1]["reduction"]
        self.summary_dim: int = self.model.head_hidden_size
        self.spatial_dim: int = self.model.num_features
        self.pixel_mean: Sequence[float] = self.model.pretrained_cfg["mean"]
        self.pixel_std: Sequence[float] = self.model.pretrained_cfg["std"]

    @torch.no_grad()
    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Found by running one blank image, for no formula holds for every model's padding."""
        parameter = next(self.parameters())
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            spatial = self(parameter.new_zeros(1, 3, height, width)).spatial
        except (AssertionError, IndexError, RuntimeError) as error:  # how timm's models refuse a size
            made_for = " x ".join(map(str, self.model.pretrained_cfg["input_size"][1:]))
            raise UserError(
                f"student 'timm/{self.name}' does not take {height} x {width} images ({error}). Give "
                f"{made_for}, which it was made for, or the setting img_size if the model has it"
            ) from error
        finally:
            for module, training in modes:
                module.training = training
        return spatial.shape[1], spatial.shape[2]

    def forward(self, images: Tensor) -> StudentOutput:
        features = self.model.forward_features(images)
        summary = self.model.forward_head(features, pre_logits=True)  # b d
        return StudentOutput(summary, self._spatial(features, images.shape[-2], images.shape[-1]))

    def _spatial(self, features: object, height: int, width: int) -> Tensor:
        if not isinstance(features, Tensor):
            raise UserError(f"student 'timm/{self.name}' gives no single feature map: choose another model")
        if features.ndim == 4 and getattr(self.model, "output_fmt", "NCHW") == "NHWC":
            return features
        if features.ndim == 4:
            return features.permute(0, 2, 3, 1)  # b h w d
        h, w = -(-height // self.patch_size), -(-width // self.patch_size)
        prefix = features.shape[1] - h * w
        if prefix < 0:
            whole = height % self.patch_size == width % self.patch_size == 0
            remedy = "choose another model" if whole else f"give multiples of {self.patch_size}"
            raise UserError(
                f"student 'timm/{self.name}' gives {features.shape[1]} tokens for {height} x {width} pixels, "
                f"fewer than its {h} x {w} patches: {remedy}"
            )
        return features[:, prefix:].reshape(len(features), h, w, -1)  # b h w d


def _create_at(model: str, resolution: tuple[int, int] | None, settings: dict[str, Any]) -> Any:
    """timm's model, made for `resolution` where timm says that its size is fixed and can be chosen."""
    config = timm.get_pretrained_cfg(model)
    if resolution is None or config is None or not config.fixed_input_size or "img_size" in settings:
        return _create(model, settings)
    try:
        return _create(model, {**settings, "img_size": resolution})
    except UserError:
        return _create(model, settings)  # timm has no means for this one: `grid` says whether it fits
    except AssertionError as error:
        height, width = resolution
        reason = f" ({error})" if str(error) else ""
        square = ", or another square" if height != width else ""
        raise UserError(
            f"student 'timm/{model}' cannot be made for {height} x {width} images{reason}; give "
            f"{' x '.join(map(str, config.input_size[1:]))}, which it was made for{square}"
        ) from error


def _create(model: str, settings: dict[str, Any]) -> Any:
    """timm's model. Which settings one takes shows only on trying: a refusal names the first it does not."""
    try:
        return timm.create_model(model, num_classes=0, **settings)
    except TypeError as error:
        refused = re.search(r"(?:unexpected|multiple values for) keyword argument '(\w+)'", str(error))
        if refused is None:
            raise
        raise UserError(
            f"student 'timm/{model}' does not take the setting {refused[1]!r}: remove it"
        ) from error
    except ValueError as error:
        raise UserError(f"student 'timm/{model}' does not take {settings} ({error}): change them") from error
