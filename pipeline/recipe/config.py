"""A whole recipe: read from TOML and `--set`, written out again; unknown keys refused, the nearest one named.

A stage receives its own section and nothing else, so its fingerprint covers exactly what it could have read.
"""

from __future__ import annotations

import reprlib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from foundation.errors import LONGEST, ConfigError, brief, first_line, nearest
from pipeline.recipe.data import DataSection
from pipeline.recipe.export import ExportSection
from pipeline.recipe.policy import GateSection, Policy, Rule
from pipeline.recipe.prune import PruneSection
from pipeline.recipe.race import OptimizeSection
from pipeline.recipe.removal import FoldSection, ShrinkSection
from pipeline.recipe.section import Section, Seed, readable
from pipeline.recipe.source import BaselineSection
from pipeline.recipe.target import OFF_TARGET, QUANTITIES, TargetSection
from pipeline.recipe.task import TaskSection
from pipeline.recipe.train import FinetuneSection

RESERVED = "releases.jsonl"
"""What lies in an artifacts folder beside the models."""
LONGEST_NAME = 200
"""Bytes of a folder's name; file systems take 255, and some are put in front of it."""

CURVE_SECONDS = 300.0
"""For measuring curves where the recipe did not ask for them: where nothing is trained, nothing is worth as much."""

AIMED_SECONDS = 16.0
"""For the gate's race where a latency was asked for and the recipe names none: it ends earlier where it is sure to be
within the target. Where other machines' programs fill the cache, two files took 0.261 to 0.338 of each other in six
races of 4 s, 0.274 to 0.309 in six of 16 s between them.
"""

S = TypeVar("S", bound=Section)


class Config(Section):
    """A whole recipe."""

    model: str = Field(
        "",
        max_length=4000,
        description="torchvision name, timm:NAME, hf:..., file.py:callable, module:callable or onnx:PATH",
    )
    name: str | None = Field(None, description="folder under artifacts/; made from the model when left out")
    artifacts: Path = Path("artifacts")
    seed: Seed = Field(0, description="seed of every section that sets none")
    data: DataSection = DataSection()
    task: TaskSection = TaskSection()
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
        if value is not None and len(value.encode()) > LONGEST_NAME:
            raise ValueError(f"must be at most {LONGEST_NAME} bytes long")
        if value is not None and (not value or value.startswith(".") or "/" in value or "\\" in value):
            raise ValueError("must be a plain folder name, without slashes or a leading dot")
        if value is not None and value.casefold() == RESERVED:
            raise ValueError(f"must not be {RESERVED}, which is the log of the artifacts folder")
        return value

    @field_validator("artifacts")
    @classmethod
    def _readable_path(cls, value: Path) -> Path:
        readable(str(value))
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

    @model_validator(mode="before")
    @classmethod
    def _choose_by_curves(cls, values: Any) -> Any:
        """Where nothing is trained, or a target is to be met, what goes is chosen by measured curves unless the recipe
        names a scope: no epoch mends a bad choice, nothing else is worth as much there (docs/comparison.md), and what
        a width costs is held against what it is worth.
        """
        if not isinstance(values, dict):
            return values
        finetune, prune = values.get("finetune"), values.get("prune", {})
        recover = finetune.get("recover") if isinstance(finetune, dict) else getattr(finetune, "recover", None)
        if not isinstance(prune, dict) or "scope" in prune or not (recover == "closed-form" or _aimed(prune)):
            return values
        if prune.get("method", "structured") != "structured":
            return values
        criterion = {} if {"criterion", "norm"} & prune.keys() else {"criterion": "elimination"}
        return {**values, "prune": {"seconds": CURVE_SECONDS, **criterion, **prune, "scope": "curves"}}

    @model_validator(mode="after")
    def _measure_as_judged(self) -> Config:
        return _measured_as_judged(self)

    def as_judged(self, target: TargetSection) -> TargetSection:
        """`target` with the gate's threads and batch size, and the format and opset of the file that ships, where it
        names none of its own: the latency is then the one that is judged.
        """
        return target.model_copy(
            update={
                "threads": target.threads or (self.gate.threads,),
                "batch_sizes": target.batch_sizes or (self.gate.batch_size,),
                "int8": self.optimize.int8 if target.int8 is None else target.int8,
                "opset": target.opset or self.export.opset,
            }
        )


def _measured_as_judged(config: Config) -> Config:
    """The recipe, a target of latency or size that of the file which ships, the gate at the first setting of the
    target where it names none, and its warning with it. Raises ValueError for an int8 file that is never made.
    """
    target, gate = config.prune.target, config.gate
    if target.latency is None and target.size is None:
        return config
    if target.int8 and not config.optimize.int8:
        raise ValueError("prune.target.int8 is true, and optimize.int8 is not: no such file is made")
    if target.latency is None:  # a size hangs on nothing else of a setting
        filled = target.model_copy(update={"int8": config.as_judged(target).int8})
    else:
        first = {"threads": target.threads[:1], "batch_size": target.batch_sizes[:1]}
        named = {key: one[0] for key, one in first.items() if one and key not in gate.model_fields_set}
        gate = gate.model_copy(update=named)
        judged = config.model_copy(update={"gate": gate})
        filled = judged.as_judged(target)
        limit = _limit(judged, filled)
        if limit is not None and limit not in gate.limits:
            longer = {} if "seconds" in gate.model_fields_set else {"seconds": AIMED_SECONDS}
            gate = gate.model_copy(update={"limits": (*gate.limits, limit), **longer})
    return config.model_copy(update={"gate": gate, "prune": config.prune.model_copy(update={"target": filled})})


def _limit(config: Config, target: TargetSection) -> Rule | None:
    """The warning that goes with a latency target; None where it is another device's, or of another setting or format
    than the gate's, and the gate cannot measure it.
    """
    wanted = target.amounts["latency"]
    setting = config.gate.threads in target.threads and config.gate.batch_size in target.batch_sizes
    if target.device is not None or not setting or target.int8 != config.optimize.int8:
        return None
    most = (wanted.share if wanted.share is not None else wanted.absolute or 0.0) * (1 + OFF_TARGET)
    against = "dense" if wanted.share is not None else None
    return Rule.model_validate({"metric": "latency", "against": against, "max": round(most, 6), "level": "warn"})


def _aimed(prune: Mapping[str, Any]) -> bool:
    target = prune.get("target")
    given = target if isinstance(target, dict) else {} if target is None else target.model_dump()
    return any(given.get(quantity) is not None for quantity in QUANTITIES)


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
    """The recipe with the limits of `policy` in place of its own; how they are measured stays, and so does the warning
    that goes with a latency target.
    """
    return _measured_as_judged(config.model_copy(update={"gate": config.gate.model_copy(update=dict(policy))}))


def as_aimed(config: Config) -> Config:
    """The recipe as it is read where a latency is asked for, which may say more of what can go; without the target.
    Raises ConfigError for one that cannot have a target.
    """
    if config.prune.target.amounts:
        return config
    values = config.model_dump(exclude_unset=True)
    values.setdefault("prune", {}).setdefault("target", {})["latency"] = 0.5  # any
    try:
        made = Config.model_validate(values)
    except ValidationError as error:
        raise _explain(error) from None
    target = made.prune.target.model_copy(update={"latency": None})
    return config.model_copy(update={"prune": made.prune.model_copy(update={"target": target})})


def checked(kind: type[S], **values: Any) -> S:
    """A section of the recipe made from values, such as options. Raises ConfigError as `load` does."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _explain(error, kind) from None


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
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--set {key.strip()}: the value cannot be read: {first_line(error)}.", _PLAINER) from None


def _read(recipe: Path, kind: str = "recipe") -> dict[str, Any]:
    try:
        with recipe.open("rb") as file:  # a device or a pipe may have no end
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ConfigError(f"The {kind} {recipe} cannot be read: it is longer than {_MOST_BYTES} bytes.", _PLAINER)
        return tomllib.loads(content.decode("utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{recipe} is not valid TOML: {error}.", "Mend that line.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The {kind} {recipe} cannot be read: {first_line(error)}.", "Check the path.") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, a path with NUL, endless nesting
        raise ConfigError(f"The {kind} {recipe} cannot be read: {first_line(error)}.", _PLAINER) from None


_MOST_BYTES = 1 << 20
_PLAINER = "Write it plainer; see docs/recipe.md for the keys and their values."


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
        return ConfigError(f"Unknown key {brief(key)} in the {kind}.", _near_key(where, root or Config))
    reason = problem["msg"].removeprefix("Value error, ")[:LONGEST]  # it may quote what was given
    return ConfigError(f"{key}: {reason} (got {_shown(problem['input'])}).", "See docs/recipe.md for the ranges.")


def _shown(value: Any) -> str:
    try:
        return reprlib.repr(value)
    except ValueError:  # more digits than Python writes out
        return "a number of thousands of digits"


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
