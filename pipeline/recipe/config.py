"""The recipe: every choice of a run, one section per stage, unknown keys refused.

A stage receives its own section and nothing else, so its fingerprint covers exactly what it could have read.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, ValidationError, field_validator, model_validator

from foundation.files import sha256
from pipeline.errors import ConfigError, nearest
from pipeline.training.loop import TrainSettings

# Only what was set is written out and fingerprinted: the rest is chosen from the model, and another choice.
Training = Annotated[
    TrainSettings | None,
    PlainSerializer(lambda given: given.model_dump(exclude_unset=True) if given else None, return_type=dict | None),
]


class Section(BaseModel):
    """A part of the recipe: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def code(self) -> dict[str, str]:
        """The user's own files that this section names -> their sha256, since they decide the result too."""
        return {}


class DataSection(Section):
    """Which data trains, calibrates and judges."""

    source: str = Field("digits", description="digits, imagefolder:PATH, npz:PATH or path/to/file.py:callable")
    input_size: tuple[int, int, int] | None = Field(None, description="C, H, W; the data's own size when left out")


class BaselineSection(Section):
    """Stage 0: the dense model."""

    weights: str = Field("auto", description="a .safetensors/.pt file, 'pretrained', 'train', or 'auto' = train here")
    train: Training = Field(None, description="how to train here; what is left out is chosen from the model")
    opset: int = Field(23, ge=18, description="ONNX opset of the dense reference file")
    threads: int = Field(1, ge=1, description="onnxruntime threads for the dense latency")
    seed: int = 0

    @field_validator("weights")
    @classmethod
    def _not_empty(cls, value: str) -> str:
        return value or "auto"


class GroupSwitches(Section):
    """Which kinds of channel groups pruning may take."""

    channels: bool = True
    neurons: bool = Field(True, description="feed-forward neurons")
    heads: bool = Field(True, description="whole attention heads")
    head_positions: bool = Field(False, description="the same positions inside every head")
    residual: bool = Field(False, description="residual streams under LayerNorm, with the exact norm rewrite")


class PruneSection(Section):
    """Stage 1: what is masked."""

    method: Literal["structured", "unstructured", "2:4", "none"] = "structured"
    ratio: float = Field(0.5, ge=0.0, lt=1.0, description="share of groups (structured) or weights to remove")
    norm: Literal["l1", "l2"] = "l2"
    scope: Literal["layer", "global"] = Field("layer", description="rank inside each layer, or over the whole model")
    align: int | Literal["auto"] = Field("auto", description="kept channels are a multiple; auto = host vector block")
    floor: float = Field(0.1, ge=0.0, le=1.0, description="share of every layer's groups that always stays")
    overrides: dict[str, float] = Field(default_factory=dict, description="layer glob -> ratio")
    groups: GroupSwitches = GroupSwitches()
    schedule: Literal["one-shot", "iterative", "gradual"] = "one-shot"
    steps: int = Field(3, ge=1, description="rounds of iterative pruning; mask updates per epoch when gradual")
    train: Training = Field(None, description="the recovery between rounds (iterative, gradual)")
    seed: int = 0

    @field_validator("align")
    @classmethod
    def _align(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("must be at least 1, or 'auto'")
        return value

    @field_validator("overrides")
    @classmethod
    def _overrides(cls, value: dict[str, float]) -> dict[str, float]:
        for glob, ratio in value.items():
            if not 0.0 <= ratio < 1.0:
                raise ValueError(f"the ratio for {glob!r} must be in [0, 1), got {ratio}")
        return value


class FinetuneSection(Section):
    """Stage 2: recovery under the masks."""

    epochs: int | None = Field(None, ge=0, description="chosen from the model when left out; 0 skips recovery")
    distill_weight: float = Field(0.5, ge=0.0, le=1.0, description="share of the loss taught by the dense model")
    distill_temperature: float = Field(2.0, gt=0.0)
    train: Training = Field(None, description="any other setting of the training; wins over the three above")
    seed: int = 0


class FoldSection(Section):
    """Stage 3: masks into weights."""

    seed: int = 0


class ShrinkSection(Section):
    """Stage 4: remove dead channels."""

    seed: int = 0


class ExportSection(Section):
    """Stage 5: ONNX."""

    opset: int = Field(23, ge=18, description="from 23 on, norms over removed channels become one operator")
    centre: bool = Field(True, description="store residual streams that lost channels centred, so that they do")
    seed: int = 0


class OptimizeSection(Section):
    """Stage 6: which candidates race, how they are proven, and which of them may ship."""

    candidates: Annotated[tuple[str, ...], Field(min_length=1)] | None = Field(
        None,
        description="which candidates of the table in exporters/candidates.py to make, the first of which the others "
        "are timed against; left out: those that race by default",
    )
    int8: bool = Field(
        False,
        description="race int8-minmax, int8-entropy, int8-percentile and int8-dynamic as well, and each with -host",
    )
    ship: Literal["portable", "host"] = Field(
        "portable", description="files for any machine, or also for this one only"
    )
    prefer: Literal["latency", "size"] = Field(
        "latency", description="the fastest of those that passed, or the smallest"
    )
    ort_format: bool = Field(False, description="whether a .ort file may ship; it is made and timed either way")
    parity: float = Field(1e-5, gt=0, description="float candidates: |a-b| at most this times max(1, max|reference|)")
    max_accuracy_drop_points: float = Field(
        1.0, ge=0, description="int8: accuracy lost on the calibration part, points"
    )
    calibration_samples: int = Field(256, ge=1, description="samples of the calibration part that find int8 ranges")
    threads: tuple[int, ...] = Field((1,), min_length=1, description="onnxruntime threads to time at")
    batch_sizes: tuple[int, ...] = Field((1,), min_length=1, description="batch sizes to time at")
    seconds: float = Field(5.0, gt=0, description="time spent racing, for each number of threads and batch size")
    seed: int = 0

    @field_validator("threads", "batch_sizes")
    @classmethod
    def _positive(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        if any(value < 1 for value in values):
            raise ValueError("must be at least 1")
        return values


class Rule(Section):
    """A limit on one metric: as it is, or against the dense or the promoted model.

    Against another model, accuracies count the points lost, further metrics what their mean lost, and everything else
    is a ratio. A rule against the promoted version binds only once there is one.
    """

    metric: str = Field(description="one that the gate measures: accuracy, latency, latency_p99, file_size, ...")
    against: Literal["dense", "promoted"] | None = None
    max: float | None = None
    min: float | None = None
    level: Literal["required", "warn"] = "required"
    by: Literal["value", "interval"] | None = Field(None, description="interval: all of it must be inside the limit")

    @model_validator(mode="after")
    def _bounded(self) -> Rule:
        if self.max is None and self.min is None:
            raise ValueError(f"the limit on {self.metric!r} has neither max nor min")
        if any(value is not None and math.isnan(value) for value in (self.max, self.min)):
            raise ValueError(f"the limit on {self.metric!r} is not a number")
        return self


class Policy(Section):
    """What a release must reach; the gate section of a recipe, or a file of its own."""

    max_accuracy_drop_points: float = Field(1.0, description="accuracy of dense minus shipped, in points")
    accuracy_by: Literal["value", "interval"] = Field(
        "value", description="judge the measured drop, or its whole 95 % interval"
    )
    max_latency_ratio: float = Field(1.0, gt=0, description="shipped over dense latency, medians")
    max_size_ratio: float = Field(1.0, gt=0, description="shipped over dense file size")
    parity: float = Field(1e-5, gt=0, description="|a-b| at most this times max(1, max|reference|), every hop")
    limits: tuple[Rule, ...] = Field((), description="further limits")

    @field_validator("max_accuracy_drop_points")
    @classmethod
    def _number(cls, value: float) -> float:
        if math.isnan(value):
            raise ValueError("is not a number")
        return value


class GateSection(Policy):
    """Stage 7: limits, and how what they limit is measured."""

    threads: int = Field(1, ge=1, description="onnxruntime threads for the latency")
    batch_size: int = Field(1, ge=1, description="batch size for the latency")
    seconds: float = Field(4.0, gt=0, description="time for measuring latency; less where it is decided earlier")
    metrics: tuple[str, ...] = Field((), description="also: top5, cosine, spearman, path/to/file.py:callable")
    seed: int = 0

    def code(self) -> dict[str, str]:
        """The files of the user's own metrics -> their sha256."""
        files = (Path(name.rpartition(":")[0]) for name in self.metrics if ":" in name)
        return {str(file): sha256(file) for file in files if file.is_file()}


class Config(Section):
    """A whole recipe."""

    model: str = Field("", description="torchvision name, timm:NAME, hf:..., file.py:callable or module:callable")
    name: str | None = Field(None, description="folder under artifacts/; made from the model when left out")
    artifacts: Path = Path("artifacts")
    seed: int = Field(0, description="seed of every section that sets none")
    data: DataSection = DataSection()
    baseline: BaselineSection = BaselineSection()
    prune: PruneSection = PruneSection()
    finetune: FinetuneSection = FinetuneSection()
    fold: FoldSection = FoldSection()
    shrink: ShrinkSection = ShrinkSection()
    export: ExportSection = ExportSection()
    optimize: OptimizeSection = OptimizeSection()
    gate: GateSection = GateSection()

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str | None) -> str | None:
        if value is not None and (not value or value.startswith(".") or "/" in value or "\\" in value):
            raise ValueError("must be a plain folder name, without slashes or a leading dot")
        return value

    @model_validator(mode="before")
    @classmethod
    def _spread_seed(cls, values: Any) -> Any:
        """Give the top-level seed to every section that sets none."""
        if not isinstance(values, dict) or "seed" not in values:
            return values
        seeded = dict(values)
        for key, field in cls.model_fields.items():
            section = field.annotation
            if isinstance(section, type) and issubclass(section, Section) and "seed" in section.model_fields:
                given = seeded.get(key, {})
                if isinstance(given, dict):
                    seeded[key] = {"seed": values["seed"], **given}
        return seeded


def load(recipe: Path | None = None, settings: Mapping[str, Any] | None = None) -> Config:
    """The recipe file with `settings` (dotted key -> value) laid over it.

    Raises ConfigError for an unreadable file, an unknown key (the nearest one is named) or a value out of range.
    """
    values: dict[str, Any] = _read(recipe) if recipe is not None else {}
    for key, value in (settings or {}).items():
        _put(values, key, value)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise _explain(error) from None


def load_policy(path: Path) -> Policy:
    """A policy file: the keys of a recipe's gate section that are limits, at the top level.

    Raises ConfigError as `load` does.
    """
    try:
        return Policy.model_validate(_read(path, "policy"))
    except ValidationError as error:
        raise _explain(error, Policy, "policy") from None


def with_policy(config: Config, policy: Policy) -> Config:
    """The recipe with the limits of `policy` in place of its own; how they are measured stays."""
    return config.model_copy(update={"gate": config.gate.model_copy(update=dict(policy))})


def parse_setting(text: str) -> tuple[str, Any]:
    """`key.sub=value` -> (key, value); the value is read as TOML, and as plain text where it is not TOML.

    Raises ConfigError when there is no `=`.
    """
    key, found, value = text.partition("=")
    if not found or not key.strip():
        raise ConfigError(f"--set {text!r} is not key=value.", "Write it like --set prune.ratio=0.3")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value


def _read(recipe: Path, kind: str = "recipe") -> dict[str, Any]:
    try:
        return tomllib.loads(recipe.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{recipe} is not valid TOML: {error}.", "Mend that line.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The {kind} {recipe} cannot be read: {error}.", "Check the path.") from None


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for parent in parents:
        inner = values.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{parent!r} in {key!r} is a value, not a section.", "See `leanort deploy --help`.")
        values = inner
    values[leaf] = value


def _explain(error: ValidationError, root: type[Section] | None = None, kind: str = "recipe") -> ConfigError:
    """The first problem, as one line with the dotted key."""
    problem = error.errors()[0]
    where = [part for part in problem["loc"] if isinstance(part, str)]
    key = ".".join(where)
    if problem["type"] == "extra_forbidden":
        return ConfigError(f"Unknown key {key!r} in the {kind}.", _near_key(where, root or Config))
    reason = problem["msg"].removeprefix("Value error, ")
    return ConfigError(f"{key}: {reason} (got {problem['input']!r}).", "See `leanort deploy --help` for the ranges.")


def _near_key(where: Sequence[str], section: Any) -> str:
    for part in where[:-1]:
        section = _section(section.model_fields[part].annotation)
    known = list(section.model_fields)
    return nearest(where[-1], known) or f"Known here: {', '.join(known)}."


def _section(annotation: Any) -> type[BaseModel]:
    """The model class inside `Section` or `Section | None`."""
    options = [annotation, *getattr(annotation, "__args__", ())]
    return next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))


def to_toml(config: Config) -> str:
    """The whole recipe, defaults written out, as TOML that `load` reads back to the same value."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))
