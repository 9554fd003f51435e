"""The layers of a model in dataflow order, each with its width before and after a removal."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch.export.graph_signature import InputKind

from pipeline.channels.coupling.groups import Analysis, Kind, Removed
from pipeline.channels.operators.table import base_name, bind, find
from pipeline.channels.operators.values import Value


@dataclass(frozen=True)
class Layer:
    """One convolution, linear layer or the like. `before` and `after`: output channels.

    `cluster` and `kind`: the group cluster that most of its outputs belong to, or "" and None where they all stay;
    `reason` then says why, with the operator and its node.
    """

    name: str
    op: str
    before: int
    after: int
    cluster: str
    kind: Kind | None
    reason: str


def layers(analysis: Analysis, removed: Removed) -> tuple[Layer, ...]:
    """Every operator that multiplies by a named weight, as it runs."""
    program, trace, solution = analysis.captured.program, analysis.trace, analysis.solution
    gone = analysis.gone(removed)
    owner = {
        spec.arg.name: spec.target.rpartition(".")[0] or spec.target
        for spec in program.graph_signature.input_specs
        if spec.kind == InputKind.PARAMETER and spec.target is not None
    }
    # Class -> number of its cluster, −1 where it stays.
    cluster_of = np.full(solution.reason_of.shape[0], -1, np.int64)
    for k, cluster in enumerate(analysis.clusters):
        cluster_of[analysis.members[cluster.name]] = k
    found: list[Layer] = []
    for node in analysis.counted:
        card = find(node.target)
        value = trace.values.get(node)
        if card is None or card.weighted is None or not isinstance(value, Value) or value.derived:
            continue
        weight = bind(node)[card.weighted.weight]
        name = owner.get(getattr(weight, "name", ""))
        if name is None:
            continue
        dim = card.weighted.output_dim % len(value.shape)
        before, atoms = value.shape[dim], value.atoms[dim]
        if atoms is None:
            found.append(Layer(name, base_name(node.target), before, before, "", None, "its outputs are fixed"))
            continue
        classes = solution.class_of[atoms]
        numbers = cluster_of[classes]
        after = before - int(gone[atoms].sum())
        if (numbers >= 0).any():  # its outputs may belong to several clusters: the one that holds most of them
            lead = analysis.clusters[int(np.bincount(numbers[numbers >= 0]).argmax())]
            found.append(Layer(name, base_name(node.target), before, after, lead.name, lead.kind, ""))
        else:
            found.append(Layer(name, base_name(node.target), before, after, "", None, analysis.why_kept(classes)))
    return tuple(found)
