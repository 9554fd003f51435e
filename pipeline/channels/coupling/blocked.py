"""How much of a model's parameters could go, and what keeps the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.channels.coupling.groups import Blocked
from pipeline.channels.coupling.solve import Solution
from pipeline.channels.coupling.walk import Slot
from pipeline.channels.operators.trace import ROWS, SPACE
from pipeline.channels.operators.values import Flags
from pipeline.channels.program.capture import Captured


@dataclass(frozen=True)
class Shares:
    """Parameter elements in all, those in at least one slice that could go, and what keeps the others."""

    params: int
    removable: int
    blocked: tuple[Blocked, ...]


def account(
    captured: Captured, parameters: Sequence[str], slots: Sequence[Slot], solution: Solution, removable: Flags
) -> Shares:
    """Every element of `parameters` as removable or blocked; `removable`: class -> whether it could go."""
    by_name: dict[str, list[Slot]] = {}
    for slot in slots:
        by_name.setdefault(slot.name, []).append(slot)
    total = could_go = 0
    blocked: dict[tuple[str, str, str], int] = {}
    for name in parameters:
        tensor = captured.state[name]
        fixed_sizes = list(tensor.shape)
        reasons: list[tuple[str, str, str]] = []
        for slot in by_name.get(name, ()):
            classes = solution.class_of[slot.atoms]
            fixed = ~removable[classes]
            fixed_sizes[slot.dim] = int(fixed.sum())
            if fixed.any():
                reasons.append(solution.why(classes[fixed]))
        kept = math.prod(fixed_sizes)  # an element stays where all its dimensions are fixed
        total += tensor.numel()
        could_go += tensor.numel() - kept
        if kept:
            # The least common of the dimensions' reasons tells most.
            key = min(
                reasons,
                key=lambda r: (r[2] == ROWS, r[2] == SPACE, r[0] == "output"),
                default=("-", "-", "a single number"),
            )
            blocked[key] = blocked.get(key, 0) + kept
    return Shares(
        total,
        could_go,
        tuple(
            Blocked(op, node, reason, count)
            for (op, node, reason), count in sorted(blocked.items(), key=lambda i: -i[1])
        ),
    )
