"""What `train` and `eval` read from a recipe: sections `store`, `data`, `student`, `training` and
`evaluation`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from storage_schemas.errors import UserError
from storage_schemas.manifest import Frozen, Positive
from storage_schemas.recipe import DataConfig, StoreConfig, parse
from storage_schemas.sources import expand_shards

Resolution = Annotated[
    tuple[Positive, Positive],
    BeforeValidator(lambda value: (value, value) if isinstance(value, int) else value),
]
Weight = Annotated[float, Field(ge=0)]


class StudentConfig(Frozen, extra="allow"):
    """Section `student`. Keys beside `name` are settings of the student; it refuses unknown ones."""

    name: str

    @property
    def settings(self) -> dict[str, Any]:
        """What the student is given."""
        return dict(self.model_extra or {})


class LossConfig(Frozen, allow_inf_nan=False):
    """Weights and forms of AM-RADIO's two losses (section 3.4).

    summary_weight and spatial_weight are the paper's lambda and gamma by teacher, 1 where none is given;
    weight 0 leaves a teacher out. summary: the distance of summaries. The spatial loss is `cosine` times
    cosine distance plus `smooth_l1` times the `magnitude`; the paper's is smooth L1. transition: where the
    quadratic part of smooth L1 ends, in both losses.
    """

    summary_weight: dict[str, Weight] = Field(default_factory=dict)
    spatial_weight: dict[str, Weight] = Field(default_factory=dict)
    summary: Literal["cosine", "smooth_l1", "l1", "mse"] = "cosine"
    cosine: Weight = 0.9
    smooth_l1: Weight = 0.1
    magnitude: Literal["smooth_l1", "l1", "mse"] = "smooth_l1"
    transition: float = Field(1.0, gt=0)

    @field_validator("smooth_l1")
    @classmethod
    def _is_a_loss(cls, smooth_l1: float, info: ValidationInfo) -> float:
        if not smooth_l1 and not info.data.get("cosine"):
            raise ValueError("is 0 beside cosine 0: nothing would be learned from spatial features")
        return smooth_l1

    def weight(self, term: str) -> float:
        """Of a term of the loss, named teacher/summary or teacher/spatial."""
        teacher, kind = term.split("/")
        weights = self.summary_weight if kind == "summary" else self.spatial_weight
        return weights.get(teacher, 1.0)

    def require_known(self, teachers: Collection[str]) -> None:
        """UserError for a weight of a teacher that is not one of `teachers`."""
        for field in ("summary_weight", "spatial_weight"):
            unknown = [name for name in getattr(self, field) if name not in teachers]
            if unknown:
                raise UserError(
                    f"training.loss.{field}: {unknown[0]!r} is not trained from; there: {', '.join(teachers)}"
                )


class GroupConfig(Frozen):
    """A teacher group (AM-RADIO section 4, rank/teacher partitioning): teachers that share a resolution and a
    batch size.

    resolution, batch_size: those of `training` if not given. share: of the ranks, or of the steps, beside the
    shares of the other groups.
    """

    teachers: tuple[str, ...] = Field(min_length=1)
    resolution: Resolution | None = None
    batch_size: Positive | None = None
    share: Positive = 1


class BalancingConfig(Frozen, allow_inf_nan=False):
    """How the terms of the loss are weighed beside each other; see `trainer.balancing`.

    penalty: of uncertainty, its factor of softplus. momentum: of AdaLoss.
    """

    kind: Literal["naive", "uncertainty", "adaloss", "amtml_kd"] = "naive"
    penalty: float = Field(0.5, gt=0)
    momentum: float = Field(0.99, ge=0, lt=1)


class TrainingConfig(Frozen, allow_inf_nan=False):
    """Section `training`.

    output: folder of checkpoints and metrics. teachers: names in the store, all of them if not given.
    resolution: of the student's images, one number or [height, width]. batch_size: views a step over all
    ranks. groups: teacher groups by name, instead of `teachers`. split: whether a step serves all groups,
    each on its share of the ranks, or one group on all ranks; `auto` is ranks where there are several.
    accumulate: pieces that a rank's batch is cut into, one after the other. learning_rate: warmed up linearly
    for `warmup` steps, then a cosine to zero at `steps`. clip: of the gradient norm, none if null. ema: decay
    of the average of the weights, which is then evaluated and exported; none if null. start_from: a
    checkpoint's folder, whose student, and whose heads for the teachers it has, this run starts from;
    teachers it has not get new heads. adaptor_hidden, adaptor_blocks: hidden width and residual blocks of the
    heads; see `trainer.adaptors`. normalizer: of the targets, before the loss; see `trainer.normalizers`.
    balancing: of the terms of the loss; see `trainer.balancing`. block_rows, window_blocks: of the block
    shuffle. threads: that load batches, each a whole batch; up to `threads + prefetch` batches are in memory.
    on_corrupt: what is done with a row whose checksum does not hold: end the run, or leave the row out and
    count it. log_every, evaluate_every: steps between lines of metrics, and between evaluations on the
    held-out views; each checkpoint has a line too. keep: newest checkpoints to keep. wandb: a project of
    Weights & Biases that is told the metrics, too.
    """

    output: str = Field(min_length=1)
    teachers: tuple[str, ...] = ()
    resolution: Resolution = (224, 224)
    batch_size: Positive = 32
    groups: dict[str, GroupConfig] = Field(default_factory=dict)
    split: Literal["auto", "ranks", "steps"] = "auto"
    accumulate: Positive = 1
    steps: Positive
    learning_rate: float = Field(1e-3, gt=0)
    warmup: int = Field(0, ge=0)
    weight_decay: float = Field(0.02, ge=0)
    clip: float | None = Field(1.0, gt=0)
    seed: int = Field(0, ge=0, lt=2**63)
    loss: LossConfig = LossConfig()
    balancing: Annotated[
        BalancingConfig, BeforeValidator(lambda value: {"kind": value} if isinstance(value, str) else value)
    ] = BalancingConfig()
    ema: float | None = Field(None, gt=0, lt=1)
    start_from: str | None = None
    adaptor_hidden: Positive | None = None
    adaptor_blocks: int = Field(0, ge=0)
    normalizer: Literal["none", "standardize", "phi_s"] = "none"
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    device: str = "auto"
    block_rows: Positive = 256
    window_blocks: Positive = 16
    threads: Positive = 2
    prefetch: int = Field(2, ge=0)
    on_corrupt: Literal["stop", "skip"] = "stop"
    log_every: Positive = 10
    evaluate_every: Positive | None = None
    checkpoint_every: Positive = 1000
    keep: Positive = 2
    wandb: str | None = Field(None, min_length=1)

    @field_validator("warmup")
    @classmethod
    def _ends_within_the_run(cls, warmup: int, info: ValidationInfo) -> int:
        if warmup > info.data.get("steps", warmup):
            raise ValueError(f"is more than the {info.data['steps']} steps of the run")
        return warmup

    @field_validator("groups")
    @classmethod
    def _hold_each_teacher_once(
        cls, groups: dict[str, GroupConfig], info: ValidationInfo
    ) -> dict[str, GroupConfig]:
        if groups and info.data.get("teachers"):
            raise ValueError("name their own teachers; remove training.teachers")
        grouped = [teacher for group in groups.values() for teacher in group.teachers]
        twice = [teacher for teacher in grouped if grouped.count(teacher) > 1]
        if twice:
            raise ValueError(f"name teacher {twice[0]!r} twice; a teacher is in one group")
        return groups

    def teacher_groups(self, recorded: Sequence[str]) -> dict[str, GroupConfig]:
        """The groups with all their settings; a single one of all teachers where the recipe names none."""
        groups = self.groups or {"all": GroupConfig(teachers=self.teachers or tuple(recorded))}
        own = {"resolution": self.resolution, "batch_size": self.batch_size}
        return {
            name: group.model_copy(
                update={key: value for key, value in own.items() if getattr(group, key) is None}
            )
            for name, group in groups.items()
        }


# Fields of `training` in which a run may differ from the one it resumes: they decide where and how fast it
# computes, and what it says of itself. (Another device, or a compiled model, rounds differently.)
FREE_ON_RESUME = frozenset(
    {
        *("output", "device", "compile", "split", "accumulate", "threads", "prefetch", "on_corrupt"),
        *("log_every", "evaluate_every", "checkpoint_every", "keep", "wandb"),
    }
)


class EvaluationConfig(Frozen, allow_inf_nan=False):
    """Section `evaluation`. The bank of k-NN is view 0 of `data.train`, its queries view 0 of
    `data.held_out`.
    """

    batch_size: Positive = 64
    k: Positive = 20
    temperature: float = Field(0.07, gt=0)


class TrainConfig(Frozen):
    """All that training and evaluation need."""

    store: StoreConfig
    data: DataConfig
    student: StudentConfig
    training: TrainingConfig
    evaluation: EvaluationConfig = EvaluationConfig()

    @classmethod
    def from_recipe(cls, recipe: dict[str, Any]) -> TrainConfig:
        """The sections of a recipe that training reads."""
        return parse(cls, {name: recipe[name] for name in cls.model_fields if name in recipe}, "recipe")

    def train_shards(self) -> dict[str, str]:
        """URLs of the source shards to train on, by name; UserError if one is held out."""
        found = expand_shards(self.data.train, "data.train")
        both = sorted(found.keys() & expand_shards(self.data.held_out, "data.held_out").keys())
        if both:
            raise UserError(f"data.held_out: shard {both[0]!r} is in data.train too; take it out of one")
        return found

    def held_out_shards(self) -> dict[str, str]:
        """URLs of the source shards that are never trained on, by name; UserError if there are none."""
        if not self.data.held_out:
            raise UserError("data.held_out: is missing from the recipe; evaluation needs it")
        self.train_shards()
        return expand_shards(self.data.held_out, "data.held_out")

    def with_held_out(self, url: str) -> TrainConfig:
        """The same, evaluated on one shard only."""
        return self.model_copy(update={"data": self.data.model_copy(update={"held_out": (url,)})})


def require_same_run(before: TrainConfig, now: TrainConfig, where: str) -> None:
    """UserError naming the settings of the student or of the training in which `now` differs from what was
    before at `where`, but for those that are free to.
    """
    differ = []
    for section in ("student", "training"):
        old, new = (_flat(getattr(config, section).model_dump()) for config in (before, now))
        differ += [
            f"{section}.{key}: {where} has {old.get(key)!r}, the recipe has {new.get(key)!r}"
            for key in sorted(old.keys() | new.keys(), key=lambda key: (key != "name", key))
            if old.get(key) != new.get(key) and key not in FREE_ON_RESUME
        ]
    if differ:
        raise UserError(f"{'; '.join(differ)}; use the checkpoint's, or another training.output")


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
