"""From a captured model to its channel groups: walk, solve, form clusters, account for every parameter."""

from __future__ import annotations

from typing import Any

from torch.export.graph_signature import InputKind

from foundation.files import memory_of
from pipeline.channels.coupling.blocked import account
from pipeline.channels.coupling.clusters import form
from pipeline.channels.coupling.groups import Analysis
from pipeline.channels.coupling.solve import solve
from pipeline.channels.coupling.walk import walk
from pipeline.channels.operators.trace import Policy, Trace
from pipeline.channels.operators.values import PINNED, Atoms, Value
from pipeline.channels.program.capture import Captured
from pipeline.channels.program.macs import count_macs, counted


def analyse(captured: Captured, policy: Policy | None = None) -> Analysis:
    """Channel groups of a captured model under `policy`."""
    policy = policy or Policy()
    trace, slots = walk(captured, policy)
    solution = solve(trace)
    formed = form(trace, slots, solution, captured)
    parameters = _parameters(captured)
    shares = account(captured, parameters, slots, solution, formed.removable)
    return Analysis(
        clusters=formed.clusters,
        blocked=shares.blocked,
        params=shares.params,
        macs=count_macs(captured.program),
        removable_share=shares.removable / max(shares.params, 1),
        captured=captured,
        policy=policy,
        trace=trace,
        slots=tuple(slots),
        solution=solution,
        members=formed.members,
        parameter_names=parameters,
        dimensions=_dimensions(trace),
        counted=tuple(n for n in captured.program.graph.nodes if counted(n)),
        batch=_batch(captured),
    )


def _parameters(captured: Captured) -> tuple[str, ...]:
    program = captured.program
    seen: set[Any] = set()
    names: list[str] = []
    used = {n.name for n in program.graph.nodes if n.op == "placeholder" and n.users}
    for spec in program.graph_signature.input_specs:
        if spec.kind != InputKind.PARAMETER or spec.target is None or spec.arg.name not in used:
            continue
        name = spec.target
        tensor = program.state_dict[name]
        key = memory_of(name, tensor)
        if key not in seen:
            seen.add(key)
            names.append(name)
    return tuple(names)


def _batch(captured: Captured) -> int:
    first = next((x for x in captured.example if hasattr(x, "shape") and len(x.shape)), None)
    return int(first.shape[0]) if first is not None else 1


def _dimensions(trace: Trace) -> tuple[Atoms, ...]:
    found: dict[int, Atoms] = {}
    for value in trace.values.values():
        for v in value if isinstance(value, tuple) else (value,):
            if isinstance(v, Value):
                for a in v.atoms:
                    if a is not None and a.size and a[0] != PINNED:
                        found[id(a)] = a
    return tuple(found.values())
