"""A shrunk program as an instance of the model's original class, where that class's own `forward` then computes it.

Tensors get their smaller sizes, layers their widths, and whatever number the `forward` itself reads (heads, split
sizes, groups) is found by where it goes (see `numbers`). Whether the result is the program is never concluded, it is
measured: in float32 and float64, at several batch sizes, near and far from the usual inputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from foundation.errors import RefusedError, first_line
from foundation.rounding import allowance
from pipeline import channels
from pipeline.channels.coupling.groups import Analysis, Removed
from pipeline.channels.ledger import Ledger, Rewrite
from pipeline.channels.program.capture import Captured, small
from pipeline.channels.removal.rewrite import Shrunk
from pipeline.channels.removal.verify import (
    FAR,
    ROUNDING_MARGIN,
    TOLERANCE_FLOAT32,
    TOLERANCE_FLOAT64,
    difference,
    float32_error,
)
from pipeline.models.at_home import at_home, own_class
from pipeline.models.calling import OtherInTrainingError
from pipeline.rebuilding.fit import fit, tensors
from pipeline.rebuilding.numbers import Use, module_of, put, running_in, uses
from pipeline.rebuilding.padding import pad, paddings, parameters
from pipeline.rebuilding.structure import Padding, Place, Setting, Structure

TRIES = 8
"""How often channels are given back to a kind of module that cannot do without them."""
WORTH = 0.5
"""Of the parameters that the program has less than the dense model, what the class must have less at the least."""


def rebuild(
    model: nn.Module,
    captured: Captured,
    analysis: Analysis,
    removed: Removed,
    shrunk: Shrunk,
    *,
    precise: bool = True,
) -> tuple[nn.Module | None, Structure]:
    """(`model` at the shrunk sizes, how it came to them), or (None, why its class cannot be the shrunk program).

    `model`: the dense model, plain weights, that `captured` is a capture of; it stays as it is. `captured`, `analysis`,
    `removed`: what `shrunk` was made of, the values folded. `precise`: compare in float64 as well, several times the
    work; without it, for what is compared again later.

    Where a kind of module fails on fewer channels (it takes the width of a head from its input, say), its channels
    stay, as the zeros that they are, and everything else is as small as in the program. Zeros on both sides of a
    channel get no gradient, so training leaves them zero, and what is trained is the program all the same.
    """
    kind = own_class(at_home(model)[0])
    called = f"{kind.__module__}.{kind.__qualname__}"
    going = dict(removed)
    base, first = shrunk, ""
    kept_whole: list[str] = []
    made: nn.Module | None
    for _ in range(TRIES):
        made = None
        try:
            made, biases, numbers, padded = _made(model, captured, base)
            worst, scale = compare(made, captured, shrunk, precise=precise)
            _try_training(made, captured)
            break
        except (RefusedError, ValueError) as error:
            first = first or first_line(error)
        failing = None
        if not shrunk.ledger.folds and made is not None:
            failing = _failing(made, captured) or _leaving_scales_to_torch(captured, base.ledger)
        part = type(model.get_submodule(failing)) if failing else None
        affected = _clusters_within(analysis, model, part, going) if part is not None else set()
        if part is None or not affected:
            return None, _refused(kind, called, first)
        kept_whole.append(part.__name__)
        going = {name: flags for name, flags in going.items() if name not in affected}
        base = channels.shrink(captured, analysis, going)
    else:
        return None, _refused(kind, called, first)
    dense, least, now = (_parameters(one) for one in (captured.program, shrunk.program, base.program))
    if dense - now < WORTH * (dense - least):
        return None, _refused(kind, called, first)
    before = tensors(model)
    shapes = {
        name: tuple(value.shape)
        for name, value in tensors(made).items()
        if name not in before or before[name].shape != value.shape
    }
    whole = parameters(model, padded)
    own = {name: left for name, left in base.ledger.kept.items() if name not in whole}
    kept = {
        name: {dim: tuple(where) for dim, where in own.get(name, {}).items()}
        for name in shrunk.ledger.kept
        if own.get(name, {}) != shrunk.ledger.kept[name]
    }
    words = f"the same outputs as the shrunk program: largest difference {worst:.2g}, largest output {scale:.3g}"
    if kept_whole:
        words += f"; {', '.join(dict.fromkeys(kept_whole))} keep their pruned channels, as zeros ({first})"
    return made, Structure(
        original=True, why=words, kind=called, shapes=shapes, biases=biases, kept=kept, numbers=tuple(numbers.items()),
        padded=padded,
    )  # fmt: skip


def _refused(kind: type, called: str, reason: str) -> Structure:
    why = f"the forward of {kind.__name__} does not compute the shrunk program: {reason}"
    return Structure(original=False, why=why, kind=called)


def _parameters(program: ExportedProgram) -> int:
    """Parameter elements, shared ones once."""
    return sum(value.numel() for value in {id(one): one for one in program.parameters()}.values())


def _made(
    model: nn.Module, captured: Captured, shrunk: Shrunk
) -> tuple[nn.Module, dict[str, str], dict[Place, Setting], dict[str, Padding]]:
    """A copy of `model` with the tensors and numbers of `shrunk`, not yet compared with anything; and what it took."""
    biases = _biases(captured, shrunk.ledger)
    padded = paddings(model, captured, shrunk)
    numbers = {place: to for place, to in _settings(model, captured, shrunk).items() if place[0] not in padded}
    made = copy.deepcopy(model).eval()
    put(made, numbers)
    whole: dict[str, dict[int, tuple[int, ...]]] = {name: {} for name in parameters(model, padded)}
    fit(made, state_of(shrunk.program, shrunk.ledger, captured.state, biases, whole))
    pad(made, padded)
    return made, biases, numbers, padded


def _failing(made: nn.Module, captured: Captured) -> str | None:
    """Name of the module whose `forward` fails, innermost of those that the user or a library wrote (torch's own layers
    only say that what they were given is wrong, but for its attention, which keeps all heads or none); None where none
    fails, or only the model itself.
    """

    def decides(name: str) -> bool:
        module = made.get_submodule(name)
        return isinstance(module, nn.MultiheadAttention) or not type(module).__module__.startswith("torch.nn.")

    with torch.no_grad(), running_in(made) as running:
        try:
            made(*small(captured))
        except Exception:  # which one is told by the comparison
            return next(filter(decides, reversed(running)), None) or None
    return None


def _leaving_scales_to_torch(captured: Captured, ledger: Ledger) -> str | None:
    """Name of a module whose attention has the scale that torch takes from the width of a head: the program still has
    that of the dense width, which no number of the module's own can say. None where there is none, or only the model.
    """
    nodes = {node.name: node for node in captured.program.graph.nodes}
    stated = (one.node for one in ledger.rewrites if one.argument == "scale" and one.before is None)
    return next(filter(None, (module_of(nodes[name]) for name in stated if name in nodes)), None)


def _clusters_within(analysis: Analysis, model: nn.Module, kind: type[nn.Module], going: Removed) -> set[str]:
    """Clusters that are to go and lie in any module of a kind."""
    paths = tuple(f"{name}." for name, module in model.named_modules() if type(module) is kind)
    classes: set[int] = set()
    for slot in analysis.slots:
        if slot.name.startswith(paths):
            classes |= set(analysis.solution.class_of[slot.atoms].tolist())
    return {name for name, flags in going.items() if flags.any() and classes & set(analysis.members[name].tolist())}


def state_of(
    program: ExportedProgram,
    ledger: Ledger,
    dense: Mapping[str, Tensor],
    biases: Mapping[str, str],
    kept: Mapping[str, Mapping[int, tuple[int, ...]]] | None = None,
) -> dict[str, Tensor]:
    """Every tensor of the dense state at its kept size: the program's own value, or the kept part of what it has no use
    for any more. `biases`: what the program calls a bias that the dense model has not -> its name. `kept`: what stays
    of a tensor, where that is more than in the program; its values are then those of the dense state.
    """
    held = {**program.state_dict, **{n: v for n, v in program.constants.items() if isinstance(v, Tensor)}}
    state: dict[str, Tensor] = {}
    for name, value in dense.items():
        part = value.detach()
        for dim, indices in (kept or {}).get(name, ledger.kept.get(name, {})).items():
            part = part.index_select(dim, torch.tensor(indices, dtype=torch.long))
        own = held.get(name)
        state[name] = part if own is None or own.shape != part.shape else own.detach()
    return state | {there: held[name].detach() for name, there in biases.items()}


def _biases(captured: Captured, ledger: Ledger) -> dict[str, str]:
    """Biases that constants went into and that no layer had -> their names in the layers that read them."""
    nodes = {node.name: node for node in captured.program.graph.nodes}
    found: dict[str, str] = {}
    for fold in ledger.folds:
        if fold.created:
            path = module_of(nodes[fold.node])
            name = f"{path}.bias" if path else "bias"
            if name in captured.state or not fold.parameter.endswith("_bias"):
                raise ValueError(f"constants of dead channels went into a sum behind {fold.node}")
            found[fold.parameter] = name
    return found


# ── numbers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Change:
    """One number in an argument of a call that becomes another: `at` is its position within a list of sizes."""

    module: str
    function: str
    at: int | None
    before: int
    after: Setting


def _settings(model: nn.Module, captured: Captured, shrunk: Shrunk) -> dict[Place, Setting]:
    """Which attributes have to have which value. Raises ValueError where one would have to have two."""
    changes = list(_changes(captured, shrunk))
    if not changes:
        return {}
    try:
        found = uses(model, small(captured))
    except Exception as error:  # a model that is particular about the type of its numbers; the comparison decides
        raise ValueError(f"its numbers cannot be followed ({type(error).__name__}: {first_line(error)})") from error
    settings: dict[Place, Setting] = {}
    later: list[tuple[Use, int]] = []
    for change in changes:
        for use in _meant(change, found):
            if _computed(use):
                if isinstance(change.after, int):
                    later.append((use, change.after))
                continue
            (place,) = use.number.places
            if settings.setdefault(place, change.after) != change.after:
                raise ValueError(
                    f"{_words(place)} would have to be {settings[place]} in one place and {change.after} in another"
                )
    read = {place for use in found if not _computed(use) for place in use.number.places}
    for use, after in later:
        if not use.number.places <= read:
            _solve(use, after, settings, read)
    return settings


def _computed(use: Use) -> bool:
    """Whether the number was calculated and not just read."""
    if len(use.number.places) > 1:
        return True
    (place,) = use.number.places
    return any(use.number.compute({place: probe}) != probe for probe in (1, 7, int(use.number) + 1))


def _solve(use: Use, after: int, settings: dict[Place, Setting], read: Set[Place]) -> None:
    """Settle the one place in a calculated number that is only ever calculated with; what a call also reads as it is
    (`read`) is settled by that, and the number may just as well follow a tensor's size.
    """
    open_ = [place for place in use.number.places if place not in settings and place not in read]
    if len(open_) != 1:
        return
    values: dict[Place, int] = {}
    for place, held in use.number.values.items():
        now = settings.get(place, held)
        if not _whole(now):  # sizes of their own each, which nothing is calculated with
            return
        values[place] = now
    for candidate in range(1, values[open_[0]] + 1):
        if use.number.compute({**values, open_[0]: candidate}) == after:
            settings[open_[0]] = candidate
            return


def _words(place: Place) -> str:
    return ".".join(str(part) for part in place if part != "")


def _meant(change: _Change, found: Sequence[Use]) -> list[Use]:
    """The uses that a change is about: same module, same number, the same function where one of that name is there."""
    same = [use for use in found if use.module == change.module and int(use.number) == change.before]
    for closer in (_same_function, _same_position):
        same = [use for use in same if closer(change, use)] or same
    return same


def _same_function(change: _Change, use: Use) -> bool:
    return use.function.strip("_") == change.function


def _same_position(change: _Change, use: Use) -> bool:
    """Sizes are given as a list, or one by one behind the tensor."""
    if change.at is None:
        return True
    last = use.position[-1]
    listed = len(use.position) > 2 and last == change.at
    return listed or (len(use.position) == 2 and last == change.at + 1)


def _changes(captured: Captured, shrunk: Shrunk) -> Iterator[_Change]:
    """What the ledger rewrote, number by number."""
    nodes = {node.name: node for node in captured.program.graph.nodes}
    after = {node.name: node for node in shrunk.program.graph.nodes}
    for rewrite in shrunk.ledger.rewrites:
        if rewrite.node not in nodes:
            continue
        path = module_of(nodes[rewrite.node])
        function = rewrite.op.split(".")[1] if rewrite.op.startswith("aten.") else rewrite.op
        if rewrite.argument == "operator":
            yield from _parts(rewrite, nodes[rewrite.node], after.get(rewrite.node), path)
            continue
        pairs: list[tuple[int | None, Any, Any]] = [(None, rewrite.before, rewrite.after)]
        if isinstance(rewrite.before, list) and isinstance(rewrite.after, list):
            pairs = [(at, *pair) for at, pair in enumerate(zip(rewrite.before, rewrite.after, strict=False))]
        for at, one, other in pairs:
            if _whole(one) and _whole(other) and one != other:
                yield _Change(path, function, at, one, other)


def _parts(rewrite: Rewrite, before: fx.Node, after: fx.Node | None, path: str) -> Iterator[_Change]:
    """A split into parts of other sizes, of its own each where all were equal before."""
    if after is None or "split_with_sizes" not in str(rewrite.after) or "split" not in rewrite.before:
        return
    size, sizes = before.args[1], after.args[1]
    if not isinstance(sizes, (list, tuple)) or not all(_whole(one) for one in sizes):
        return
    if isinstance(size, (list, tuple)):
        for at, (one, other) in enumerate(zip(size, sizes, strict=True)):
            if _whole(one) and one != other:
                yield _Change(path, "split", at, one, other)
    elif _whole(size):
        parts = tuple(one for one in sizes if _whole(one))
        yield _Change(path, "split", None, size, parts[0] if len(set(parts)) == 1 else parts)


def _whole(value: object) -> TypeGuard[int]:
    return type(value) is int


# ── the comparison ───────────────────────────────────────────────────────────────────────────────────────────────────


class _Eager:
    """A module as the comparison calls programs: with a number type to run in."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *inputs: Any, dtype: torch.dtype | None = None) -> Any:
        inputs = tuple(x.to(dtype) if dtype and isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)
        try:
            return self.model(*inputs)
        except Exception as error:  # of whatever class: it is the user's own code, given what it never was given
            raise RuntimeError(f"{type(error).__name__}: {first_line(error)}") from error


def compare(
    model: nn.Module, captured: Captured, shrunk: Callable[..., Any], *, precise: bool = True
) -> tuple[float, float]:
    """(largest difference, largest output) of a rebuilt module and the shrunk program on random inputs.

    Raises RefusedError where the two are not the same function up to rounding, or the module does not run.
    """
    feeds = [small(captured, batch=batch, seed=batch) for batch in ((2, 3) if captured.dynamic_batch else (2,))]
    far = tuple(FAR * x if isinstance(x, Tensor) and x.is_floating_point() else x for x in feeds[0])
    worst, scale, compared = difference(shrunk, _Eager(model), feeds)
    usual = worst <= allowance(TOLERANCE_FLOAT32, scale)
    if not compared or not (usual or worst <= ROUNDING_MARGIN * float32_error(shrunk, feeds)):
        raise RefusedError(f"its outputs differ by {worst:.2g}, of at most {scale:.3g}", "")
    if not precise:
        return worst, scale
    rounded = getattr(getattr(shrunk, "ledger", None), "rounded", False)
    try:
        exact = difference(shrunk, _Eager(copy.deepcopy(model).double()), [feeds[0], far], torch.float64)
    except RefusedError:  # it makes float32 numbers of its own, so that float32 is all that can be compared
        return worst, scale
    limit = TOLERANCE_FLOAT32 if rounded else TOLERANCE_FLOAT64
    if not exact[0] <= allowance(limit, exact[1]):
        raise RefusedError(f"its outputs differ by {exact[0]:.2g} in float64, of at most {exact[1]:.3g}", "")
    return worst, scale


def _try_training(model: nn.Module, captured: Captured) -> None:
    """Raise RefusedError where `forward` fails in training mode only: it uses layers then that the program has not."""
    twin = copy.deepcopy(model).train()
    try:
        with torch.no_grad():
            twin(*small(captured))
    except OtherInTrainingError:  # it ran
        return
    except Exception as error:
        raise RefusedError(f"in training mode it fails ({first_line(error)})", "") from error
