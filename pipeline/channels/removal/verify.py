"""The safety net, never optional: the zero check before the cut, the comparison after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from foundation.errors import RefusedError
from foundation.rounding import allowance, scaled
from pipeline.channels.coupling.groups import Analysis, Removed
from pipeline.channels.dead.constants import Reader, Shift, Survey, shifts, survey
from pipeline.channels.dead.refusal import refusals_of
from pipeline.channels.ledger import Refusal
from pipeline.channels.operators.table import draws
from pipeline.channels.operators.trace import Contraction, Trace
from pipeline.channels.operators.values import Flags
from pipeline.channels.program.capture import Captured, small
from pipeline.channels.program.execute import execute, feeds_of, run_program
from pipeline.channels.program.zeros import without_zeros, zero_slices

# Float32 rounding through a deep network; the same network in float64 must agree far more closely.
TOLERANCE_FLOAT32 = 1e-5
TOLERANCE_FLOAT64 = 1e-10
# Both sides round, each in another order of summation.
ROUNDING_MARGIN = 4.0
# How far from the usual inputs the last sample of the zero check, and a comparison in float64, look.
FAR = 30.0


Shifts = Mapping[fx.Node, tuple[Reader, Shift]]
"""Node that sums over channels -> what its bias has to take once the constant ones among them are away."""

NOT_ZERO = "not exactly zero where it is summed"


def zero_check(
    captured: Captured, analysis: Analysis, gone: Flags, removed: Removed
) -> tuple[Flags, tuple[Refusal, ...], Shifts]:
    """(`gone` without the classes that may not go; those as refusals; what biases have to take of the others).

    At every contraction, each index to be removed must be zero on one side, or a constant that a bias can take (see
    `constants`). A parameter side is read off the weights; only where that does not settle it is the graph run, once,
    and the other side looked at.
    """
    names = _parameters(captured)
    class_of = analysis.solution.class_of
    found: Survey | None = None
    why: dict[int, tuple[fx.Node, str]] = {}
    # A refused group stays, and its rows and columns count again: what was zero without them is asked once more.
    while True:
        open_ = _not_zero(captured, _open(captured, analysis, names, gone))
        if not open_:
            break
        found = found or survey(captured, analysis.trace, class_of, analysis.trace.contractions)
        before = len(why)
        for contraction, left in open_.items():
            able, _, reasons = found.judge(contraction)
            for at in np.flatnonzero(left & ~able):
                cls = int(class_of[contraction.atoms[at]])
                why.setdefault(cls, (contraction.node, reasons[at] or NOT_ZERO))
        if len(why) == before:
            break
        bad = np.zeros(analysis.solution.reason_of.shape[0], np.bool_)
        bad[list(why)] = True
        gone = gone & ~bad[class_of]
    refusals = tuple(r for r in refusals_of(analysis, why) if r.cluster in removed)
    return gone, refusals, shifts(found, open_, gone) if found is not None else {}


def _open(captured: Captured, analysis: Analysis, names: dict[str, str], gone: Flags) -> dict[Contraction, Flags]:
    """Contractions with the indices that go although the weights alone do not show a zero there."""
    open_: dict[Contraction, Flags] = {}
    for contraction in analysis.trace.contractions:
        going = gone[contraction.atoms]
        if not going.any():
            continue
        left = going & ~_zero_in_weights(captured, names, contraction, going)
        if left.any():  # a column may be zero in all rows that stay
            left &= ~_zero_in_weights(captured, names, contraction, left, analysis.trace, gone)
        if left.any():
            open_[contraction] = left
    return open_


def _parameters(captured: Captured) -> dict[str, str]:
    return {
        s.arg.name: s.target
        for s in captured.program.graph_signature.input_specs
        if s.target is not None and s.target in captured.state
    }


def _zero_in_weights(
    captured: Captured,
    names: dict[str, str],
    contraction: Contraction,
    going: Flags,
    trace: Trace | None = None,
    gone: Flags | None = None,
) -> Flags:
    """Which indices of `going` are zero in a parameter; with `gone`, in what is left of its other dimensions."""
    zero = np.zeros(going.shape, np.bool_)
    for node, dim in contraction.sides:
        if node.op == "placeholder" and node.name in names:
            weight = captured.state[names[node.name]].detach()
            if trace is not None and gone is not None:
                for d, atoms in enumerate(trace.value(node).atoms):
                    if d != dim and atoms is not None and gone[atoms].any():
                        weight = weight.index_select(d, torch.from_numpy(np.flatnonzero(~gone[atoms])))
            if weight.numel():
                zero |= going & zero_slices(weight, dim)
    return zero


def _not_zero(captured: Captured, open_: Mapping[Contraction, Flags]) -> dict[Contraction, Flags]:
    """What of `open_` is still not zero on either side once the graph has been run."""
    if not open_:
        return {}
    left = {contraction: flags.copy() for contraction, flags in open_.items()}
    watched: dict[fx.Node, list[tuple[Contraction, int]]] = {}
    for contraction in open_:
        for node, dim in contraction.sides:
            watched.setdefault(node, []).append((contraction, dim))

    def watch(node: fx.Node, value: Any) -> None:
        for contraction, dim in watched.get(node, ()):
            if left[contraction].any():
                # Far out, 0·inf is not a number; then the near sample alone decides.
                left[contraction] &= ~zero_slices(torch.nan_to_num(value), dim)

    with torch.no_grad():
        feeds = feeds_of(captured.program, _scales(captured), captured.state)
        execute(captured.program.graph, feeds, watch=watch, compute=without_zeros)
    return {contraction: flags for contraction, flags in left.items() if flags.any()}


def _scales(captured: Captured) -> tuple[Any, ...]:
    """Random inputs, the last sample `FAR` times as large: what is zero near the origin only must not pass."""
    inputs = small(captured)
    for x in inputs:
        if isinstance(x, Tensor) and x.dtype.is_floating_point and x.dim() and len(x) > 1:
            x[-1] *= FAR
    return inputs


# -- the comparison ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Proof:
    """Folded against shrunk: largest absolute differences, the scale of the outputs, the tolerances that held.

    `max_abs_diff_float64` is None where a side cannot run in float64 (a plain function).
    """

    max_abs_diff: float
    output_scale: float
    tolerance: float
    max_abs_diff_float64: float | None
    tolerance_float64: float
    inputs: int
    outputs: int


def prove(
    folded: Callable[..., Any], shrunk: Callable[..., Any], inputs: Sequence[tuple[Any, ...]], *, rounded: bool = False
) -> Proof:
    """Compare two callables on `inputs`, in float32 and, where both can, in float64.

    Tolerance: 1e-5·max(1, max|y|) in float32, 1e-10·max(1, max|y|) in float64, or 1e-5 there too where values are
    stored that were computed (`rounded`, or the ledger says so). Where float64 agrees and float32 alone does not, its
    rounding is measured: ROUNDING_MARGIN times what the folded model's float32 result is off its float64 result is
    allowed too. Raises RefusedError when that does not hold, when an output is not finite in one of the two only, or
    when nothing was compared; names the first node that differs where both sides are graphs of this package.
    """
    worst, scale, compared = difference(folded, shrunk, inputs)
    if not compared:
        raise RefusedError("Nothing was compared.", "Give at least one input, and a model with a tensor output.")
    tolerance = allowance(TOLERANCE_FLOAT32, scale)
    precise: float | None = None
    ledger = getattr(shrunk, "ledger", None)
    rounded |= ledger is not None and ledger.rounded  # some values are stored that float64 would compute anew
    tolerance_precise = allowance(TOLERANCE_FLOAT32 if rounded else TOLERANCE_FLOAT64, scale)
    if _has_float64(folded) and _has_float64(shrunk):  # where a mistake cannot hide in rounding
        precise, _, _ = difference(folded, shrunk, inputs, torch.float64)
        if not rounded:  # far inputs too: what the usual ones leave dead may be alive there
            far = [tuple(FAR * x if _is_float(x) else x for x in inputs[0])]
            far_diff, far_scale, _ = difference(folded, shrunk, far, torch.float64)
            precise = max(precise, allowance(scaled(far_diff, far_scale), scale))
            if worst > tolerance and precise <= tolerance_precise:
                tolerance = max(tolerance, ROUNDING_MARGIN * float32_error(folded, inputs))
    if not worst <= tolerance or (precise is not None and not precise <= tolerance_precise):
        drawn = _random(folded)
        if drawn is not None:
            raise RefusedError(
                f"The model draws random numbers in evaluation ({drawn.target} at '{drawn.name}'): two runs differ.",
                "Let the model take them as an input.",
            )
        where = first_difference(folded, shrunk, inputs[0]) if precise is not None else None
        raise RefusedError(
            f"The shrunk model differs from the folded one by {worst:.3g} (float64: {precise}), not {tolerance:.3g}"
            + (f"; first at node '{where}'." if where else "."),
            "Nothing was removed. Exclude the channels around that node, or report the model.",
        )
    return Proof(worst, scale, tolerance, precise, tolerance_precise, len(inputs), compared)


def float32_error(model: Any, inputs: Sequence[tuple[Any, ...]]) -> float:
    """How far a model's float32 outputs are from its float64 ones, at most."""
    worst = 0.0
    for feed in inputs:
        for x, y in zip(
            _run(model, feed, {}, "folded"), _run(model, feed, {"dtype": torch.float64}, "folded"), strict=True
        ):
            worst = max(worst, float((x.double() - y.double()).abs().nan_to_num(0.0).max()) if x.numel() else 0.0)
    return worst


def first_difference(folded: Any, shrunk: Any, feed: tuple[Any, ...]) -> str | None:
    """The first node of the folded graph whose float64 value is no longer among the shrunk graph's values.

    A node that lost channels is compared by what every kept slice must still hold: its sorted values are a subset.
    The node's name is kept by the cut, so both sides are looked up by name; nodes that only one side has are
    passed over.
    """
    small_values: dict[str, Tensor] = {}

    def keep(node: fx.Node, value: Any) -> None:
        if isinstance(value, Tensor) and value.dtype == torch.float64:
            small_values[node.name] = value

    run_program(shrunk.program, feed, None, torch.float64, watch=keep)
    found: list[str] = []

    def look(node: fx.Node, value: Any) -> None:
        other = small_values.get(node.name)
        if found or other is None or node.op != "call_function" or not isinstance(value, Tensor):
            return
        pool = torch.sort(value.flatten()).values
        at = torch.searchsorted(pool, other.flatten().contiguous()).clamp(1, max(pool.numel() - 1, 1))
        near = torch.minimum(
            (pool[at.clamp(max=pool.numel() - 1)] - other.flatten()).abs(), (pool[at - 1] - other.flatten()).abs()
        )
        if near.numel() and float(near.max()) > allowance(1e-8, float(pool.abs().max())):
            found.append(node.name)

    run_program(folded.program, feed, getattr(folded, "state", None), torch.float64, watch=look)
    return found[0] if found else None


def _random(model: Any) -> fx.Node | None:
    """The first node of the model's graph that draws random numbers."""
    program = getattr(model, "program", None)
    nodes = program.graph.nodes if program is not None else ()
    return next((n for n in nodes if n.op == "call_function" and draws(n)), None)


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype.is_floating_point


def _has_float64(model: Any) -> bool:
    return hasattr(model, "program")


def difference(
    a: Any, b: Any, inputs: Sequence[tuple[Any, ...]], dtype: torch.dtype | None = None
) -> tuple[float, float, int]:
    """(largest absolute difference, largest finite |output of a|, number of tensors compared) over `inputs`."""
    worst = scale = 0.0
    compared = 0
    extra = {} if dtype is None else {"dtype": dtype}
    for feed in inputs:
        with torch.no_grad():
            left, right = _run(a, feed, extra, "folded"), _run(b, feed, extra, "shrunk")
        if len(left) != len(right):
            raise RefusedError(f"{len(left)} outputs became {len(right)}.", "Report the model; nothing was removed.")
        for x, y in zip(left, right, strict=True):
            if x.shape != y.shape:
                raise RefusedError(
                    f"An output of shape {tuple(x.shape)} became {tuple(y.shape)}.",
                    "Report the model; nothing was removed.",
                )
            if not x.numel():
                continue
            x, y = x.to(torch.float64), y.to(torch.float64)
            if not torch.equal(torch.isfinite(x), torch.isfinite(y)):
                raise RefusedError("Infinite or NaN outputs differ.", "Check the weights for NaN.")
            finite = torch.isfinite(x)
            compared += 1
            if finite.any():
                worst = max(worst, float((x - y)[finite].abs().max()))
                scale = max(scale, float(x[finite].abs().max()))
    return worst, scale, compared


def _run(model: Any, feed: tuple[Any, ...], extra: dict[str, Any], which: str) -> list[Tensor]:
    try:
        return tensors_of(model(*feed, **extra))
    except (RuntimeError, IndexError, ValueError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise RefusedError(
            f"The {which} model does not run on the test input ({type(error).__name__}: {first}).",
            "Give inputs that the model takes; where only the shrunk one fails, report the model.",
        ) from error


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors of a model's output in order, containers flattened."""
    leaves = torch.utils._pytree.tree_leaves(output)
    return [x for x in leaves if isinstance(x, Tensor)]
