"""What a sweep asks for: one quantity at several values, and a recipe for each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from foundation.errors import ConfigError, brief
from pipeline.recipe.config import Config, to_toml
from pipeline.recipe.section import Section, file_digests
from pipeline.recipe.target import QUANTITIES, amount
from pipeline.release import fingerprint, records
from pipeline.release.reuse import folder_of

Axis = Literal["latency", "macs", "params", "size", "ratio"]
AXES: tuple[Axis, ...] = get_args(Axis)


@dataclass(frozen=True)
class Point:
    """One version to be made: the value as it was written ("0.4", "3.5ms"), and the whole recipe."""

    value: str
    config: Config


@dataclass(frozen=True)
class Sweep:
    """One quantity at several values; the recipes of the points differ in nothing else."""

    axis: Axis
    points: tuple[Point, ...]

    @property
    def model(self) -> str:
        """The spec that every point is made from."""
        return self.points[0].config.model

    @property
    def folder(self) -> Path:
        """The model's folder, with the versions in it."""
        return folder_of(self.points[0].config)

    @property
    def elsewhere(self) -> bool:
        """Whether the latency that is asked for is that of another device, which nothing here can measure."""
        return self.points[0].config.prune.target.device is not None

    def words(self, point: Point) -> str:
        """A point for people: "latency 0.4"."""
        return f"{self.axis} {point.value}"

    def digest(self) -> str:
        """Of all that is asked for: recipes, the user's files that they name, and this project's code. Where the
        artifacts lie is not in it, so that workers on several machines ask for the same.
        """
        first = self.points[0].config
        files = file_digests(first.model, first.data.source)
        for _, section in first:
            files |= section.code() if isinstance(section, Section) else {}
        plain = [to_toml(point.config.model_copy(update={"artifacts": Path("artifacts")})) for point in self.points]
        return records.digest({"recipes": plain, "files": files, "code": fingerprint.project_digest()})


def asked(given: Mapping[Axis, str | None]) -> tuple[Axis, tuple[str, ...]]:
    """Which quantity is swept, and its values as they were written.

    `given`: option -> its text. One of them holds a list; where none does, the only one that is given is a list of one.
    Raises ConfigError for no list, two of them, a list with a hole, a value that cannot be, or one that is there twice.
    """
    texts = {axis: text for axis, text in given.items() if text is not None}
    lists = [axis for axis, text in texts.items() if "," in text] or list(texts)
    if not lists:
        raise ConfigError("Nothing to sweep was named.", "Give it a list, such as --latency 0.2,0.3,0.4,0.6")
    if len(lists) > 1:
        raise ConfigError(
            f"A sweep goes along one quantity, and --{lists[0]} and --{lists[1]} were given.",
            "Give a list to one of them.",
        )
    axis = lists[0]
    values = tuple(value.strip() for value in texts[axis].split(","))
    if not all(values):
        raise ConfigError(
            f"--{axis} {brief(texts[axis])} has an empty place in its list.", f"Write it like --{axis} 0.2,0.4"
        )
    known: dict[object, str] = {}
    for value in values:
        meaning = _read(axis, value)
        if meaning in known:
            raise ConfigError(f"--{axis} names {known[meaning]} twice.", "Each value is one version: leave one out.")
        known[meaning] = value
    return axis, values


def sweep(axis: Axis, values: tuple[str, ...], recipe: Callable[[str], Config]) -> Sweep:
    """The sweep, with the recipe of each value. Raises ConfigError where a recipe is bad, or says otherwise itself."""
    made = Sweep(axis, tuple(Point(value, recipe(value)) for value in values))
    for point in made.points:
        prune = point.config.prune
        key = "prune.ratio" if axis == "ratio" else f"prune.target.{axis}"
        held = prune.ratio if axis == "ratio" else getattr(prune.target, axis)
        if held is None or _read(axis, str(held)) != _read(axis, point.value):
            raise ConfigError(
                f"--set gives {key} one value, and --{axis} a list.", "Leave the setting out: the list decides."
            )
    return made


def _read(axis: Axis, value: str) -> object:
    """What a value means, to be held against another one. Raises ConfigError."""
    if axis in QUANTITIES:
        try:
            return amount(axis, value)
        except ValueError as error:
            raise ConfigError(f"--{axis} {brief(value)}: {error}.", f"Write it like --{axis} 0.2,0.4") from None
    try:
        ratio = float(value)
    except ValueError:
        ratio = -1.0
    if not 0 <= ratio < 1:  # NaN, too
        raise ConfigError(
            f"--ratio {brief(value)}: must be a share of channels in [0, 1).", "Write it like --ratio 0.3,0.5,0.7"
        )
    return ratio
