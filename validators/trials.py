"""What two files are fed with, to see whether they compute the same: every row of their tables, many batch sizes.

Nothing is known of the files but what stands in them, so the feeds come from the reference's own graph (`domains`):

- Batch sizes: 1 to 64, each of them, where that is cheap, by the multiply-accumulates that it takes; else 1, 3, 8 and
  further ones drawn by `seed`, as many as a fixed amount of work allows, at least two.
- Other dynamic dimensions: sizes that the reference takes, 1 to 64 where that is cheap, or those that were given.
- Integers: their domain, and each row of a table at least once, with all masks on; at every position where
  that is cheap.
- Floats: standard normal, in [0, 1), all zeros, and huge of both signs; or in a range that was given.
- Whatever was given as it is: samples of real data, arrays from files.

All work is counted in multiply-accumulates and never timed, so that no verdict hangs on how fast a machine is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from foundation.errors import ValidationError, first_line
from validators.domains import BINARY, Domain, Span, integer_domains, without_graph
from validators.feeds import BATCHES, LARGE, Feed, drawable, require_drawable
from validators.macs import count_macs
from validators.runners import Array, InputSpec, Runner

LARGEST_BATCH = 64
# Multiply-accumulates: for every batch size up to the largest; for drawn ones; for each row of a table at every
# position; for each row once.
_EVERY_BATCH, _DRAWN, _EVERY_POSITION, _EVERY_ROW = 2e10, 2e11, 1e10, 4e12
_MOST_SWEEPS = 256  # feeds for tables at every position
_CHEAP_FEED = 1e9
_SMALL_BATCH = 16
_UNCOUNTED = 1e9  # taken for a model whose multiply-accumulates cannot be counted
_ELEMENT = 20.0  # what drawing and comparing a number costs, in multiply-accumulates
# Sizes that are tried for a dynamic dimension, until the reference has taken some.
_SIZES = (16, 7, 32, 5, 64, 12, 128, 3, 224, 2, 256, 1, 384, 512)
_ENOUGH = 3
_DRAWN_SIZES = 4

# A sweep of tables with the masks that may mean either turned round.
OTHER_WAY = "sweep the other way"

Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Trial:
    """The feeds for two models, what to know about them, and the inputs whose range nobody knows."""

    feeds: Callable[[], Iterator[Feed]]
    sizes: Sizes
    notes: tuple[str, ...]
    unknown: tuple[str, ...]


@dataclass(frozen=True)
class _Plan:
    """How one model is fed."""

    inputs: Sequence[InputSpec]
    domains: Mapping[str, Domain]
    ranges: Mapping[str, tuple[float, float]]
    batch: frozenset[str]
    seed: int
    unit: bool = False
    assignments: Sequence[dict[str, int]] = ()
    batches: Sequence[int] = ()
    cost: float = 1.0

    def feed(self, kind: str, batch: int, sizes: Sizes, number: int, label: str = "") -> Feed:
        """One feed; `number` seeds it, and says which of several spans an integer takes."""
        rng = np.random.default_rng([self.seed, number])
        known = {**sizes, **dict.fromkeys(self.batch, batch)}
        arrays = {spec.name: self._fill(kind, spec, known, rng, number) for spec in self.inputs}
        sized = ", ".join(f"{name} {size}" for name, size in sizes.items())
        words = label or (f"{kind}, batch {batch}" if self.batch else f"{kind}, fixed batch")
        return Feed(f"{words}, {sized}" if sized else words, arrays, "tried")

    def _fill(self, kind: str, spec: InputSpec, sizes: Sizes, rng: np.random.Generator, number: int) -> Array:
        shape, dtype = shape_of(spec, sizes), np.dtype(spec.dtype)
        given = self.ranges.get(spec.name)
        if np.issubdtype(dtype, np.floating) and spec.name not in self.domains:
            if given is not None:
                low, high = given
                made = {"zeros": np.full(shape, low), "large": np.full(shape, high)}.get(kind)
                return np.asarray(rng.uniform(low, high, shape) if made is None else made, dtype)
            if kind == "zeros":
                return np.zeros(shape, dtype)
            if kind == "large":
                return np.asarray(LARGE * rng.choice([-1.0, 1.0], shape), dtype)
            unit = kind == "unit" or (self.unit and kind != "normal")  # of the rest, what suits the model
            return np.asarray(rng.random(shape) if unit else rng.standard_normal(shape), dtype)
        domain = self.domains[spec.name].at(sizes)
        if domain.keeps is not None and domain.spans == (BINARY,):
            return _mask(kind, domain.keeps, shape, rng).astype(dtype)
        turn = number % len(domain.spans) if kind == "random" or not domain.table else 0
        low, high = _held(domain.spans[turn], dtype)
        if kind == "zeros":
            return np.full(shape, low, dtype)
        if kind == "large":
            return np.full(shape, high, dtype)
        drawn = np.int64 if dtype.kind == "f" else dtype
        return np.asarray(rng.integers(low, high, shape, drawn, endpoint=True), dtype)


def _mask(kind: str, keeps: Literal[0, 1, "either"], shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Zeros and ones, in rows of which none is masked as a whole.

    A softmax over nothing but masked scores is a matter of rounding: no model is meant for it. Where it is not known
    which of the two values masks, no row is of one kind; a sweep is then made twice ("sweep", "sweep the other way").
    """
    sweeps = kind.startswith("sweep")
    on = 1 if keeps == "either" else keeps
    fill = 1 - on if kind == "zeros" or (keeps == "either" and kind == OTHER_WAY) else on
    fixed = sweeps or kind in ("zeros", "large")
    made = np.full(shape, fill) if fixed else np.asarray(rng.integers(0, 2, shape))
    if len(shape) < 2 or shape[-1] < 2:
        return made
    if kind == "zeros" or not fixed:
        made[..., 0] = on
    if keeps == "either" and kind != "zeros":
        made[..., -1] = 1 - fill if fixed else 1 - on
    return made


def _held(span: Span, dtype: np.dtype[Any]) -> tuple[int, int]:
    """A span cut down to what a type holds."""
    low, high = (int(end) for end in span)
    if dtype.kind in "bf":
        return low, high
    info = np.iinfo(dtype)
    return max(low, int(info.min)), min(high, int(info.max))


def plan(
    reference: Runner,
    candidate: Runner,
    *,
    graph: Path | None,
    seed: int,
    sizes: Mapping[str, Sequence[int]] | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    given: Sequence[Feed] = (),
) -> Trial:
    """Plan the feeds for `reference` and `candidate`.

    `graph` is an ONNX file to read the domains and the work from, None where there is none. `sizes` gives the sizes
    that a dynamic dimension is tried at, by its name in the reference; `ranges` the values that an input takes, both
    ends included; `given` are real inputs. Raises ValidationError where one model takes what the other does not: other
    inputs, another type, a size that is fixed in the candidate alone; and where no size that is tried suits the
    reference.
    """
    sizes, ranges = sizes or {}, ranges or {}
    _same_signature(reference, candidate, sizes)
    if not all(map(drawable, reference.inputs)):
        if not given:
            require_drawable(reference.inputs, "Give inputs: --inputs FILE.npz")
        return Trial(lambda: iter(given), {}, ("only the inputs that were given were compared",), ())
    if not reference.inputs:
        raise ValidationError("The model has no inputs.", "Compare its outputs by hand.")
    domains = _domains(reference.inputs, graph, ranges, given)
    made = _started(reference, domains, sizes, ranges, seed)
    main = made.assignments[0]
    asked = sorted({size for name in made.batch for size in sizes.get(name, ())})
    made = replace(made, unit=_better_in_unit(made, reference, main), cost=_cost(made, reference, graph, main))
    made = replace(made, assignments=[*made.assignments, *_further(made, reference, sizes)])
    made = replace(made, batches=asked or (_batches(made.cost, seed) if made.batch else (1,)))
    sweeps, reached = _sweeps(made, main)

    def feeds() -> Iterator[Feed]:
        yield from given
        yield from _drawn(made)
        yield from sweeps()

    resolved = {name: domain.at(main) for name, domain in domains.items()}
    unknown = tuple(name for name, domain in resolved.items() if not domain.known)
    return Trial(feeds, main, (_words(made, resolved, sizes), *reached), unknown)


def suited(
    runner: Runner,
    *,
    graph: Path | None,
    batch: int,
    sizes: Mapping[str, Sequence[int]],
    ranges: Mapping[str, tuple[float, float]],
) -> tuple[dict[str, int], dict[str, tuple[int, int]]]:
    """What `random_feeds` needs to feed `runner`: a size for each dynamic dimension, half-open ranges of integers.

    Raises ValidationError as `plan` does.
    """
    require_drawable(runner.inputs)
    domains = _domains(runner.inputs, graph, ranges, ())
    made = _started(runner, domains, sizes, ranges, 0)
    known = {**made.assignments[0], **dict.fromkeys(made.batch, batch)}
    spans = {
        spec.name: _held(domains[spec.name].at(known).spans[0], np.dtype(spec.dtype))
        for spec in runner.inputs
        if spec.name in domains
    }
    names = {size for spec in runner.inputs for size in spec.shape if isinstance(size, str)}
    return {name: _sum(name, known) for name in names}, {name: (low, high + 1) for name, (low, high) in spans.items()}


def _started(
    reference: Runner,
    domains: Mapping[str, Domain],
    sizes: Mapping[str, Sequence[int]],
    ranges: Mapping[str, tuple[float, float]],
    seed: int,
) -> _Plan:
    """A plan with sizes that `reference` takes. Raises ValidationError where none is found."""
    trouble = ""
    for batch in _leading(reference.inputs):
        free = sorted(_free(reference.inputs) - batch)
        made = _Plan(reference.inputs, domains, ranges, batch, seed)
        found, trouble = _accepted(made, reference, free, sizes)
        if found or not free:  # without a size to choose, the comparison will say what is wrong
            return replace(made, assignments=found or [{}])
    raise ValidationError(
        f"No size that was tried for {', '.join(free)} suits {reference.name}: {trouble}",
        f"Give one: --size {free[0]}=128",
    )


def _accepted(
    plan: _Plan, reference: Runner, free: Sequence[str], sizes: Mapping[str, Sequence[int]]
) -> tuple[list[dict[str, int]], str]:
    """Assignments of sizes to the dimensions `free` that the reference can be run with, and why the last failed."""
    given = {name: tuple(sizes[name]) for name in free if name in sizes}
    left = [name for name in free if name not in given]
    trouble = ""

    def suits(assignment: Sizes) -> bool:
        nonlocal trouble
        wrong = _refused(plan, reference, assignment)
        trouble = wrong or trouble
        return wrong is None

    def assigned(turn: int, value: int) -> dict[str, int]:
        return {name: given[name][turn % len(given[name])] if name in given else value for name in free}

    turns = max((len(values) for values in given.values()), default=1)
    if not left:
        found = [assigned(turn, 0) for turn in range(turns)]
        return (found if all(map(suits, found)) else []), trouble
    found = []
    for value in _SIZES:
        made = assigned(len(found), value)
        if suits(made):
            found.append(made)
        if len(found) >= max(_ENOUGH, turns):
            break
    if len(left) > 1 and len(found) > 1:  # all of them alike hides one that is taken for another
        values = [one[left[0]] for one in found]
        mixed = found[0] | {name: values[at % len(values)] for at, name in enumerate(left)}
        found += [mixed] if suits(mixed) else []
    return found, trouble


def _refused(plan: _Plan, reference: Runner, sizes: Sizes) -> str | None:
    """Why the reference cannot be run with these sizes, or gives nothing; None where it can."""
    trouble = "its outputs are empty"
    for batch in (2, 1):
        try:
            made = reference.infer(plan.feed("sweep", batch, sizes, 0).arrays)
        except (ValidationError, KeyError, ValueError) as error:
            trouble = first_line(error)
        else:
            return None if any(array.size for array in made.values()) else trouble
    return trouble


def _further(plan: _Plan, reference: Runner, sizes: Mapping[str, Sequence[int]]) -> list[dict[str, int]]:
    """More sizes of the dynamic dimensions that nobody gave: every one where that is cheap, else some drawn ones."""
    left = [name for name in plan.assignments[0] if name not in sizes]
    if not left:
        return []
    cheap = plan.cost * sum(range(1, LARGEST_BATCH + 1)) <= _EVERY_BATCH
    order = np.random.default_rng(plan.seed).permutation(range(1, LARGEST_BATCH + 1))[: None if cheap else _DRAWN_SIZES]
    tried = {assigned[left[0]] for assigned in plan.assignments}
    wanted = [plan.assignments[0] | dict.fromkeys(left, int(value)) for value in order if value not in tried]
    return [assigned for assigned in wanted if _refused(plan, reference, assigned) is None]


def _drawn(plan: _Plan) -> Iterator[Feed]:
    """Random feeds at every batch size and every assignment of sizes, and the edges."""
    number = 0
    few = [batch for batch in BATCHES if batch in plan.batches] or plan.batches[:1]
    for at, assigned in enumerate(plan.assignments):
        for batch in plan.batches if at == 0 else few[:2]:
            number += 1
            yield plan.feed("random", batch, assigned, number)
    main = plan.assignments[0]
    spans = max((len(domain.at(main).spans) for domain in plan.domains.values()), default=1)
    for more in range(spans if spans > 1 else 0):  # at few batch sizes each span would not have had its turn
        number += 1
        yield plan.feed("random", few[-1], main, number, f"random {more + 1}, batch {few[-1]}")
    for kind in (*(["normal"] if plan.unit else []), "unit", "zeros", "large"):
        for batch in few:
            number += 1
            yield plan.feed(kind, batch, main, number)


def _better_in_unit(plan: _Plan, reference: Runner, sizes: Sizes) -> bool:
    """Whether floats in [0, 1) leave the reference more that is a number than standard normal ones do."""
    holes = []
    for kind in ("normal", "unit"):
        try:
            made = reference.infer(plan.feed(kind, 3, sizes, 0).arrays)
        except ValidationError:
            return False
        holes.append(sum(int((~np.isfinite(array)).sum()) for array in made.values() if array.dtype.kind == "f"))
    return holes[1] < holes[0]


def _cost(plan: _Plan, reference: Runner, graph: Path | None, sizes: Sizes) -> float:
    """Multiply-accumulates for one sample, with what it takes to draw the inputs and to compare the outputs."""
    feed = plan.feed("sweep", 1, sizes, 0)
    try:
        made = reference.infer(feed.arrays)
        macs = count_macs(graph, feed) if graph is not None else None
    except ValidationError:
        made, macs = {}, None
    elements = sum(array.size for array in (*feed.arrays.values(), *made.values()))
    return _ELEMENT * elements + (_UNCOUNTED if macs is None else macs)


def _batches(cost: float, seed: int) -> tuple[int, ...]:
    """Every batch size where that is cheap, else `BATCHES` and what is drawn: two small ones, and what else fits."""
    every = range(1, LARGEST_BATCH + 1)
    if cost * sum(every) <= _EVERY_BATCH:
        return tuple(every)
    order = [int(b) for b in np.random.default_rng(seed).permutation(every) if b not in BATCHES]
    drawn = [batch for batch in order if batch <= _SMALL_BATCH][:2]
    left = _DRAWN / cost - sum((*BATCHES, *drawn))
    for batch in order:
        if batch not in drawn and batch <= left:
            drawn.append(batch)
            left -= batch
    return (*BATCHES, *drawn)


def _sweeps(plan: _Plan, sizes: Sizes) -> tuple[Callable[[], Iterator[Feed]], tuple[str, ...]]:
    """Feeds that reach every row of every table, and how many they leave out where that is too much work."""
    batch = LARGEST_BATCH if plan.cost * LARGEST_BATCH <= _CHEAP_FEED else BATCHES[-1]
    batch = batch if plan.batch and batch in plan.batches else max(plan.batches)
    known = {**sizes, **dict.fromkeys(plan.batch, batch)}
    shapes, tables = {}, {}
    for spec in plan.inputs:
        domain = plan.domains[spec.name].at(known) if spec.name in plan.domains else None
        if domain is not None and domain.table:
            low, high = _held(domain.spans[0], np.dtype(spec.dtype))
            shapes[spec.name], tables[spec.name] = shape_of(spec, known), (low, high - low + 1)
    shapes = {name: shape for name, shape in shapes.items() if math.prod(shape) and tables[name][1] > 1}
    if not shapes:
        return (lambda: iter(())), ()
    rows = {name: shape[0] if shape else 1 for name, shape in shapes.items()}
    work = plan.cost * (batch if plan.batch else 1)  # of one feed
    count = max(math.ceil(tables[name][1] / rows[name]) for name in shapes)
    everywhere = count <= _MOST_SWEEPS and count * work <= _EVERY_POSITION
    if not everywhere:
        count = max(math.ceil(tables[name][1] / math.prod(shape)) for name, shape in shapes.items())
    possible = max(1, int(_EVERY_ROW / work))
    missing = [
        f"{name}: {possible * math.prod(shape)} of {tables[name][1]} rows were reached, for the work that it is"
        for name, shape in shapes.items()
        if possible * math.prod(shape) < tables[name][1]
    ]

    ways = ("sweep", *([OTHER_WAY] if any(domain.keeps == "either" for domain in plan.domains.values()) else ()))

    def feeds() -> Iterator[Feed]:
        # One order of the rows for all feeds, so that each has its turn.
        orders = {name: np.random.default_rng([plan.seed, at]) for at, name in enumerate(shapes)}
        mixed = {name: orders[name].permutation(tables[name][1]) for name in shapes}
        for at in range(min(count, possible) * len(ways)):
            turn, way = divmod(at, len(ways))
            feed = plan.feed(ways[way], batch, sizes, turn, f"table rows {at + 1}, batch {batch}")
            arrays = dict(feed.arrays)
            for name, shape in shapes.items():
                low, size = tables[name]
                if everywhere:
                    along = math.prod(shape[1:])
                    places = turn * rows[name] + np.arange(rows[name])[:, None]
                    places = places + np.arange(along)[None] * max(1, size // max(1, along))
                else:
                    places = turn * math.prod(shape) + np.arange(math.prod(shape))
                arrays[name] = (low + mixed[name][places % size]).reshape(shape).astype(arrays[name].dtype)
            yield replace(feed, arrays=arrays)

    return feeds, tuple(missing)


def _words(plan: _Plan, domains: Mapping[str, Domain], sizes: Mapping[str, Sequence[int]]) -> str:
    """What was tried, in one line."""
    said = []
    if plan.batch:
        only = " only, as --size says" if any(name in sizes for name in plan.batch) else ""
        said.append(f"batch {_listed(plan.batches)}{only}")
    for name in plan.assignments[0]:
        only = " only, as --size says" if name in sizes else ""
        said.append(f"{name} {_listed([assigned[name] for assigned in plan.assignments])}{only}")
    for name, domain in domains.items():
        spans = ", ".join(f"{low:g} to {high:g}" if high < 1e6 else f"{low} to {high}" for low, high in domain.spans)
        said.append(f"{name} {spans} ({domain.why})")
    return "; ".join([*said, f"seed {plan.seed}"])


def _listed(numbers: Sequence[int]) -> str:
    """Numbers in order, with runs as "1 to 64"."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def shape_of(spec: InputSpec, sizes: Sizes) -> tuple[int, ...]:
    """An input's shape; a dynamic dimension may be a sum of names and numbers, such as "past + 1"."""
    return tuple(size if isinstance(size, int) else _sum(size, sizes) for size in spec.shape)


def _sum(name: str, sizes: Sizes) -> int:
    if name in sizes:
        return sizes[name]
    return sum(int(part) if part.isdecimal() else sizes[part] for part in map(str.strip, name.split("+")))


def _names(name: str) -> set[str]:
    """The dynamic dimensions that stand in one: itself, or the terms of a sum."""
    parts = [part.strip() for part in name.split("+")]
    return {part for part in parts if not part.isdecimal()} if all(parts) else {name}


def _same_signature(reference: Runner, candidate: Runner, sizes: Mapping[str, Sequence[int]]) -> None:
    """Raise ValidationError where the candidate does not take what the reference takes."""
    theirs = {spec.name: spec for spec in candidate.inputs}
    if theirs.keys() != {spec.name for spec in reference.inputs}:
        raise ValidationError(
            f"{candidate.name} takes {', '.join(theirs) or 'nothing'}; "
            f"{reference.name} takes {', '.join(spec.name for spec in reference.inputs) or 'nothing'}."
        )
    for mine in reference.inputs:
        other = theirs[mine.name]
        if mine.dtype != other.dtype:
            raise ValidationError(
                f"Input {mine.name} is {other.dtype} in {candidate.name} and {mine.dtype} in {reference.name}."
            )
        if len(mine.shape) != len(other.shape):
            raise ValidationError(
                f"Input {mine.name} has {len(other.shape)} dimensions in {candidate.name} and {len(mine.shape)} in "
                f"{reference.name}."
            )
        for axis, (wanted, found) in enumerate(zip(mine.shape, other.shape, strict=True)):
            if isinstance(found, str) or wanted == found or (isinstance(wanted, str) and sizes.get(wanted) == (found,)):
                continue
            what = "batch" if axis == 0 else f"dimension {axis}"
            was = f"free ({wanted})" if isinstance(wanted, str) else f"{wanted}"
            raise ValidationError(
                f"Input {mine.name}: its {what} is fixed to {found} in {candidate.name} and {was} in {reference.name}.",
                f"Export it with a free one, or ask about this size alone: --size {wanted}={found}"
                if isinstance(wanted, str)
                else "",
            )


def _leading(inputs: Sequence[InputSpec]) -> Iterator[frozenset[str]]:
    """The dynamic dimensions that may be the batch: those that inputs begin with, all of them, or the first alone."""
    first = [spec.shape[0] for spec in inputs if spec.shape]
    names = [size for size in first if isinstance(size, str)]
    yield frozenset(names)
    if len(set(names)) > 1:
        yield frozenset(names[:1])


def _free(inputs: Sequence[InputSpec]) -> set[str]:
    return {name for spec in inputs for size in spec.shape if isinstance(size, str) for name in _names(size)}


def _domains(
    inputs: Sequence[InputSpec],
    graph: Path | None,
    ranges: Mapping[str, tuple[float, float]],
    given: Sequence[Feed],
) -> dict[str, Domain]:
    """The domain of each integer input: a range that was given, what the graph says, what real inputs hold."""
    read = integer_domains(graph) if graph is not None else {}
    found = {}
    for spec in inputs:
        if np.issubdtype(np.dtype(spec.dtype), np.floating) and (spec.name not in read or spec.name in ranges):
            continue
        domain = read.get(spec.name) or without_graph(spec.name, spec.dtype)
        seen = [feed.arrays[spec.name] for feed in given if feed.arrays[spec.name].size]
        if spec.name in ranges:
            span = ranges[spec.name]
            keeps = domain.keeps if span == BINARY else None
            domain = Domain((span,), "the range that was given", table=bool(domain.rows), keeps=keeps)
        elif not domain.known and seen:
            low, high = min(int(array.min()) for array in seen), max(int(array.max()) for array in seen)
            domain = Domain(((low, high),), "what the given inputs hold")
        found[spec.name] = domain
    return found
