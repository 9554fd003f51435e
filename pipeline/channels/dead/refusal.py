"""Groups that stay although they were asked to go, or look dead, each with the node and the reason."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from pipeline.channels.coupling.groups import Analysis
from pipeline.channels.ledger import Refusal
from pipeline.channels.operators.table import base_name

Causes = Mapping[int, tuple[fx.Node, str]]
"""Class -> the node because of which it stays, and the reason."""


def refusals_of(analysis: Analysis, why: Causes) -> tuple[Refusal, ...]:
    """`why` as refusals: groups of a cluster that share node and reason are one refusal."""
    refusals = []
    for name, classes in analysis.members.items():
        by_cause: dict[tuple[fx.Node, str], list[int]] = {}
        for group, cls in enumerate(classes.tolist()):
            if cls in why:
                by_cause.setdefault(why[cls], []).append(group)
        refusals += [
            Refusal(name, tuple(groups), base_name(node.target), node.name, reason)
            for (node, reason), groups in by_cause.items()
        ]
    return tuple(refusals)
