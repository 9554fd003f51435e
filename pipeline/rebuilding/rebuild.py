"""A shrunk program as an instance of the model's original class, where that class's own `forward` then computes it.

Tensors get their smaller sizes, layers their widths, and whatever number the `forward` itself reads (heads, split
sizes, groups) is found by where it goes (see `numbers`). Whether the result is the program is never concluded, it is
measured: in float32 and float64, at several batch sizes, near and far from the usual inputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from foundation.errors import RefusedError, first_line
from foundation.rounding import allowance
from pipeline.channels.ledger import Ledger, Rewrite
from pipeline.channels.program.capture import Captured, small
from pipeline.channels.removal.rewrite import Shrunk
from pipeline.channels.removal.verify import FAR, TOLERANCE_FLOAT32, TOLERANCE_FLOAT64, difference
from pipeline.models.at_home import own_class
from pipeline.rebuilding.fit import fit
from pipeline.rebuilding.numbers import Use, module_of, put, uses
from pipeline.rebuilding.structure import Place, Setting, Structure


def rebuild(model: nn.Module, captured: Captured, shrunk: Shrunk) -> tuple[nn.Module | None, Structure]:
    """(`model` at the shrunk sizes, how it came to them), or (None, why its class cannot be the shrunk program).

    `model`: the dense model, plain weights, that `captured` is a capture of; it stays as it is. `captured`: what was
    shrunk, with the values that were folded into it.
    """
    kind = own_class(model)
    called = f"{kind.__module__}.{kind.__qualname__}"
    try:
        biases = _biases(captured, shrunk.ledger)
        numbers = _settings(model, captured, shrunk)
        made = copy.deepcopy(model).eval()
        put(made, numbers)
        fit(made, state_of(shrunk.program, shrunk.ledger, captured.state, biases))
        whole = _widened(made, captured, shrunk.ledger)
        worst, scale = compare(made, captured, shrunk)
        _try_training(made, captured)
    except (RefusedError, ValueError) as error:
        reason = f"the forward of {kind.__name__} does not compute the shrunk program: {first_line(error)}"
        return None, Structure(original=False, why=reason, kind=called)
    before = dict(_tensors(model))
    shapes = {
        name: tuple(value.shape)
        for name, value in _tensors(made)
        if name not in before or before[name].shape != value.shape
    }
    why = f"the same outputs as the shrunk program: largest difference {worst:.2g}, largest output {scale:.3g}"
    return made, Structure(
        original=True, why=why, kind=called, shapes=shapes, biases=biases, whole=whole, numbers=tuple(numbers.items())
    )


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _widened(made: nn.Module, captured: Captured, ledger: Ledger) -> dict[str, int]:
    """Give layers their columns of zeros back whose input the class computes at full width out of nothing (a table of
    positions, say), in place: tensor -> the dimension that is whole again.
    """
    found: dict[str, int] = {}

    def whole(name: str, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        channels = inputs[0].shape[-1] if isinstance(layer, nn.Linear) else inputs[0].shape[1]
        weight, dense = layer.weight, captured.state.get(f"{name}.weight")
        assert isinstance(weight, Tensor)
        if dense is None or channels == weight.shape[1] or channels != dense.shape[1]:
            return
        rows = torch.tensor(ledger.kept.get(f"{name}.weight", {}).get(0, range(len(dense))))
        layer.weight = nn.Parameter(dense.detach().index_select(0, rows), weight.requires_grad)
        found[f"{name}.weight"] = 1

    handles = [
        layer.register_forward_pre_hook(lambda layer, inputs, name=name: whole(name, layer, inputs))
        for name, layer in made.named_modules()
        if type(layer) in (nn.Linear, nn.Conv1d, nn.Conv2d) and getattr(layer, "groups", 1) == 1
    ]
    try:
        with torch.no_grad():
            made(*small(captured))
    except (RuntimeError, ValueError, AssertionError, IndexError):
        pass  # the comparison that follows says what is wrong
    finally:
        for handle in handles:
            handle.remove()
    return found


def state_of(
    program: ExportedProgram,
    ledger: Ledger,
    dense: Mapping[str, Tensor],
    biases: Mapping[str, str],
    whole: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """Every tensor of the dense state at its kept size: the program's own value, or the kept part of what it has no use
    for any more. `biases`: what the program calls a bias that the dense model has not -> its name. `whole`: tensor -> a
    dimension of which nothing goes.
    """
    whole = whole or {}
    held = {**program.state_dict, **{n: v for n, v in program.constants.items() if isinstance(v, Tensor)}}
    state: dict[str, Tensor] = {}
    for name, value in dense.items():
        part = value.detach()
        for dim, indices in ledger.kept.get(name, {}).items():
            if whole.get(name) != dim:
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
    values = {place: settings.get(place, held) for place, held in use.number.values.items()}
    for candidate in range(1, values[open_[0]] + 1):  # type: ignore[operator]
        if use.number.compute({**values, open_[0]: candidate}) == after:  # type: ignore[dict-item]
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
        parts = sizes[0] if len(set(sizes)) == 1 else tuple(sizes)
        yield _Change(path, "split", None, size, parts)  # type: ignore[arg-type]


def _whole(value: object) -> bool:
    return type(value) is int


# ── the comparison ───────────────────────────────────────────────────────────────────────────────────────────────────


class _Eager:
    """A module as the comparison calls programs: with a number type to run in."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *inputs: Any, dtype: torch.dtype | None = None) -> Any:
        inputs = tuple(x.to(dtype) if dtype and isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)
        return self.model(*inputs)


def compare(model: nn.Module, captured: Captured, shrunk: Callable[..., Any]) -> tuple[float, float]:
    """(largest difference, largest output) of a rebuilt module and the shrunk program on random inputs.

    Raises RefusedError where the two are not the same function up to rounding, or the module does not run.
    """
    feeds = [small(captured, batch=batch, seed=batch) for batch in ((2, 3) if captured.dynamic_batch else (2,))]
    far = tuple(FAR * x if isinstance(x, Tensor) and x.is_floating_point() else x for x in feeds[0])
    worst, scale, compared = difference(shrunk, _Eager(model), feeds)
    usual = worst <= allowance(TOLERANCE_FLOAT32, scale)
    if not compared or not (usual or worst <= allowance(_rounding(shrunk, feeds), scale)):
        raise RefusedError(f"its outputs differ by {worst:.2g}, of at most {scale:.3g}", "")
    rounded = getattr(getattr(shrunk, "ledger", None), "rounded", False)
    try:
        precise = difference(shrunk, _Eager(copy.deepcopy(model).double()), [feeds[0], far], torch.float64)
    except RefusedError:  # it makes float32 numbers of its own, so that float32 is all that can be compared
        return worst, scale
    limit = TOLERANCE_FLOAT32 if rounded else TOLERANCE_FLOAT64
    if not precise[0] <= allowance(limit, precise[1]):
        raise RefusedError(f"its outputs differ by {precise[0]:.2g} in float64, of at most {precise[1]:.3g}", "")
    return worst, scale


def _try_training(model: nn.Module, captured: Captured) -> None:
    """Raise RefusedError where `forward` fails in training mode only: it uses layers then that the program has not."""
    twin = copy.deepcopy(model).train()
    try:
        with torch.no_grad():
            twin(*small(captured))
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        raise RefusedError(f"in training mode it fails ({first_line(error)})", "") from error


MARGIN = 4.0
"""Both sides round, each in another order of summation."""


def _rounding(shrunk: Callable[..., Any], feeds: Sequence[tuple[Any, ...]]) -> float:
    """What float32 may differ by, of the outputs' scale: the usual, or what the program itself is off in float32."""

    def widened(*inputs: Any, dtype: torch.dtype | None = None) -> Any:
        return shrunk(*inputs, dtype=torch.float64)

    worst, scale, _ = difference(widened, shrunk, feeds)
    return max(TOLERANCE_FLOAT32, MARGIN * worst / max(1.0, scale))
