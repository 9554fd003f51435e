"""Residual streams of a shrunk graph: every tensor that holds one, what writes to it, what reads it raw.

Found from the norms backwards and forwards, through every operator that is linear and treats all channels alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx
from torch.export import ExportedProgram

from pipeline.channels.operators.card import WeightedSum
from pipeline.channels.operators.carry import carried
from pipeline.channels.operators.table import base_name, bind, find, kind_of

# Microseconds in onnxruntime on one AVX2 core, 384 -> 191 channels, 197 tokens (benchmarks/norm_forms.py): what a norm
# gains by the change, and what T and U cost as operators. Only their ratios matter.
GAIN, WIDEN_COST, NARROW_COST = 72.0, 80.0, 30.0

Site = tuple[fx.Node, int]
"""A tensor of the graph and the dimension in which it holds the stream's channels."""


@dataclass(frozen=True, eq=False)
class Norm:
    """pad -> layer_norm -> slice: LayerNorm over `full` channels of which `kept` are left."""

    pad: fx.Node
    norm: fx.Node
    cut: fx.Node
    full: int
    kept: int
    eps: float
    gamma: fx.Node | None
    beta: fx.Node | None


@dataclass(frozen=True)
class Layer:
    """A layer with a weight of its own: what its card says, and what is in those places."""

    facts: WeightedSum
    weight: fx.Node
    bias: fx.Node | None


def layer_of(node: fx.Node, held: Mapping[fx.Node, Tensor]) -> Layer | None:
    """The node as a layer, if its weight is a parameter."""
    card = find(node.target)
    if card is None or card.weighted is None:
        return None
    facts, a = card.weighted, bind(node)
    weight = a[facts.weight]
    return Layer(facts, weight, a[facts.bias] if facts.bias else None) if weight in held else None


@dataclass
class Stream:
    """Everything that holds one stream, writes to it or reads it."""

    full: int
    kept: int
    members: dict[Site, None] = field(default_factory=dict)
    norms: list[Norm] = field(default_factory=list)
    rows: dict[fx.Node, fx.Node | None] = field(default_factory=dict)  # linear or convolution -> its layer scale
    tables: dict[tuple[fx.Node, str], int] = field(default_factory=dict)  # (node, argument), parameter -> dimension
    columns: dict[fx.Node, None] = field(default_factory=dict)  # linear layers that read it raw
    widen: dict[Site, list[fx.Node]] = field(default_factory=dict)  # where T is put in -> what follows the stream
    narrow: dict[tuple[fx.Node, fx.Node, int], None] = field(default_factory=dict)  # (reader, member, dimension)
    dissolved: dict[fx.Node, fx.Node] = field(default_factory=dict)  # layer scale's product -> its activation

    @property
    def gain(self) -> float:
        """What the change saves per token, in the units of the constants above."""
        return GAIN * len(self.norms) - WIDEN_COST * len(self.widen) - NARROW_COST * len(self.narrow)


def held_tensors(program: ExportedProgram, graph: fx.Graph) -> dict[fx.Node, Tensor]:
    """Placeholder -> the floating tensor that it stands for."""
    values = {**program.constants, **program.state_dict}
    targets = {s.arg.name: s.target for s in program.graph_signature.input_specs if s.target is not None}
    found: dict[fx.Node, Tensor] = {}
    for node in graph.nodes:
        value = values.get(targets.get(node.name, "")) if node.op == "placeholder" else None
        if isinstance(value, Tensor) and value.dtype.is_floating_point:
            found[node] = value.detach()
    return found


def find_norms(graph: fx.Graph) -> list[Norm]:
    """Every LayerNorm over a dimension that lost channels, as its card leaves it: pad, layer_norm, slice."""
    found: list[Norm] = []
    for node in graph.nodes:
        if node.op != "call_function" or base_name(node.target) != "layer_norm":
            continue
        a = bind(node)
        pad = a["input"]
        users = list(node.users)
        if len(a["normalized_shape"]) != 1 or not _pads_last(pad) or len(pad.users) != 1 or len(users) != 1:
            continue
        full, kept = a["normalized_shape"][0], _size(pad.args[0], -1)
        cut = bind(users[0]) if base_name(users[0].target) == "slice" else {}
        if cut.get("end") != kept or cut.get("start") or cut.get("step") not in (1, None):
            continue
        affine = [p.args[0] if _pads_last(p) else p for p in (a["weight"], a["bias"])]
        found.append(Norm(pad, node, users[0], full, kept, a["eps"], affine[0], affine[1]))
    return found


def _pads_last(node: Any) -> bool:
    if not isinstance(node, fx.Node) or base_name(node.target) != "constant_pad_nd":
        return False
    a = bind(node)
    return len(a["pad"]) == 2 and a["pad"][0] == 0 and not a["value"]


def shape_of(node: fx.Node) -> tuple[int | None, ...]:
    """The sizes of the node's tensor, None where they are dynamic: to compare a symbol with a number would fix it."""
    return tuple(size if isinstance(size, int) else None for size in node.meta["val"].shape)


def _size(node: fx.Node, dim: int) -> Any:
    return shape_of(node)[dim]


def find_streams(norms: list[Norm], held: Mapping[fx.Node, Tensor]) -> list[Stream]:
    """The streams under `norms`, each once."""
    streams: list[Stream] = []
    by_pad = {n.pad: n for n in norms}
    for norm in norms:
        source: Any = norm.pad.args[0]
        site = (source, len(shape_of(source)) - 1)
        if any(site in s.members for s in streams):
            continue
        stream = Stream(norm.full, norm.kept)
        _collect(stream, site, by_pad, held)
        streams.append(stream)
    return streams


def _collect(stream: Stream, start: Site, by_pad: Mapping[fx.Node, Norm], held: Mapping[fx.Node, Tensor]) -> None:
    """Follow the stream through everything that is linear in it, channel by channel alike."""
    waiting = [start]
    while waiting:
        site = waiting.pop()
        if site in stream.members or site in stream.widen:
            continue
        sources = _sources(stream, site, held)
        if sources is None:
            stream.widen[site] = []  # it stays as it is beside its centred twin
        else:
            stream.members[site] = None
            waiting += sources
        node, dim = site
        for user in list(node.users):
            if user in stream.dissolved:
                continue
            norm = by_pad.get(user)
            if norm is not None and dim == len(shape_of(node)) - 1 and norm.full == stream.full:
                stream.norms.append(norm)
                stream.widen.get(site, []).append(user)
                continue
            ahead = _forward(user, node, dim)
            if ahead is not None:
                waiting.append(ahead)
                stream.widen.get(site, []).append(user)
            elif sources is None:
                continue
            elif reads_raw(user, node, dim, held):
                stream.columns[user] = None
            elif not reads_size(user, node, dim):
                stream.narrow[user, node, dim] = None


def _sources(stream: Stream, site: Site, held: Mapping[fx.Node, Tensor]) -> list[Site] | None:
    """What the tensor is made of, noting its writer; None where T has to be applied to it as it is."""
    node, dim = site
    if node.op != "call_function":
        return None
    name, card = base_name(node.target), find(node.target)
    if card is not None and card.weighted is not None:
        return [] if _writes_rows(stream, node, dim, held) else None
    if name in ("add", "sub"):
        return _addends(stream, node, dim, held)
    if name == "mul" and all(isinstance(a, fx.Node) for a in node.args):
        return _scaled(stream, node, dim, held)
    if name == "cat":
        return _concatenated(stream, node, dim, held)
    before = _backward(node, dim)
    if before is None:
        return None
    source: Any = node.args[0]
    if source in held:
        return [] if _table(stream, node, source, "0", before) else None
    return [(source, before)] if _size(source, before) == stream.kept else None


def _writes_rows(stream: Stream, node: fx.Node, dim: int, held: Mapping[fx.Node, Tensor]) -> bool:
    layer = layer_of(node, held)
    if layer is None or (layer.bias is not None and layer.bias not in held):
        return False
    plain = bind(node)["groups"] == 1 if layer.facts.windows else held[layer.weight].dim() == 2
    written = plain and dim == layer.facts.output_dim % len(shape_of(node))
    if written:
        stream.rows[node] = None
    return written


def _table(stream: Stream, node: fx.Node, source: fx.Node, argument: str, dim: int) -> bool:
    """A parameter that is part of the stream (position table, class token)."""
    if _size(source, dim) != stream.kept:
        return False
    stream.tables[node, argument] = dim
    return True


def _addends(stream: Stream, node: fx.Node, dim: int, held: Mapping[fx.Node, Tensor]) -> list[Site] | None:
    if node.kwargs or len(node.args) != 2:
        return None  # another factor than one
    rank = len(shape_of(node))
    found: list[Site] = []
    tables: list[tuple[fx.Node, str, int]] = []
    for number, operand in enumerate(node.args):
        if not isinstance(operand, fx.Node) or not isinstance(operand.meta.get("val"), Tensor):
            return None
        at = dim - (rank - len(shape_of(operand)))
        if at < 0 or _size(operand, at) != stream.kept:
            return None
        if operand in held:
            tables.append((operand, str(number), at))
        else:
            found.append((operand, at))
    for operand, argument, at in tables:
        _table(stream, node, operand, argument, at)
    return found


def _concatenated(stream: Stream, node: fx.Node, dim: int, held: Mapping[fx.Node, Tensor]) -> list[Site] | None:
    a = bind(node)
    if a["dim"] % len(shape_of(node)) == dim:
        return None
    if any(operand in held for operand in a["tensors"]):
        return None
    return [(operand, dim) for operand in a["tensors"]]


def _scaled(stream: Stream, node: fx.Node, dim: int, held: Mapping[fx.Node, Tensor]) -> list[Site] | None:
    """A layer scale: the product of a branch with a parameter of one number per channel goes into the branch's rows."""
    first, second = _nodes(node)
    for factor, branch in ((first, second), (second, first)):
        scale = _scale_parameter(factor, dim - len(shape_of(node)), stream.kept, held)
        if scale is None or branch in held:
            continue
        end, end_dim = branch, dim
        chain: list[Site] = []
        while end.op == "call_function" and len(end.users) == 1:
            chain.append((end, end_dim))
            before = _backward(end, end_dim)
            if before is None:
                break
            (end, *_), end_dim = _nodes(end), before
        else:
            return None
        if not _writes_rows(stream, end, end_dim, held):
            return None
        stream.rows[end] = scale
        stream.dissolved[node] = branch
        stream.members.update(dict.fromkeys(chain))
        return []
    return None


def _scale_parameter(node: fx.Node, dim: int, size: int, held: Mapping[fx.Node, Tensor]) -> fx.Node | None:
    """The parameter behind `node` if that holds one number per channel in dimension `dim` (negative), else None."""
    at: int | None = dim + len(shape_of(node))
    while at is not None and at >= 0 and _one_each(shape_of(node), at, size):
        if node in held:
            return node
        card = find(node.target)
        if card is None or not card.moves:
            return None
        at = _backward(node, at)
        (node, *_) = _nodes(node)
    return None


def _one_each(shape: tuple[int | None, ...], dim: int, size: int) -> bool:
    """Whether `dim` is of `size` and every other dimension of length one."""
    return all(n == (size if d == dim else 1) for d, n in enumerate(shape))


def _nodes(node: fx.Node) -> list[fx.Node]:
    """The positional arguments that are nodes."""
    return [a for a in node.args if isinstance(a, fx.Node)]


def _backward(node: fx.Node, dim: int) -> int | None:
    """The first operand's dimension that holds the channels, where the operator is linear and treats all alike."""
    source: Any = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not isinstance(source.meta.get("val"), Tensor):
        return None
    ahead = {d: moved(node, d) for d in range(len(shape_of(source)))}
    hits = [d for d, to in ahead.items() if to == dim]
    return hits[0] if len(hits) == 1 else None


def _forward(user: fx.Node, node: fx.Node, dim: int) -> Site | None:
    """Where the channels are in `user`, if it belongs to the stream too."""
    if user.op != "call_function" or not isinstance(user.meta.get("val"), Tensor):
        return None
    name = base_name(user.target)
    if name in ("add", "sub") and not user.kwargs and len(user.args) == 2:
        back = dim - len(shape_of(node))  # counted from the end, as broadcasting does
        fits = [isinstance(a, fx.Node) and -back <= len(shape_of(a)) and _size(a, back) == _size(node, dim)
                for a in user.args]  # fmt: skip
        return (user, back + len(shape_of(user))) if all(fits) else None
    if name == "cat":
        a = bind(user)
        return None if a["dim"] % len(shape_of(user)) == dim else (user, dim)
    to = moved(user, dim) if user.args and user.args[0] is node else None
    return None if to is None else (user, to)


def moved(node: fx.Node, dim: int) -> int | None:
    """Where the first operand's dimension `dim` goes. None where its indices are mixed, where the operator is not known
    or was only just put in, and where its sizes are those of something else, which would not follow.
    """
    to = carried(node, dim) if isinstance(node.meta.get("val"), Tensor) else None
    if to is None:
        return None
    a = bind(node)
    return None if "stride" in a or isinstance(a.get("other"), fx.Node) else to


def reads_raw(user: fx.Node, node: fx.Node, dim: int, held: Mapping[fx.Node, Tensor]) -> bool:
    """Whether `user` is a linear layer with a weight of its own that sums over `node`'s dimension `dim`."""
    layer = layer_of(user, held)
    if layer is None or layer.facts.windows or layer.facts.input_dim is None:
        return False
    reads = bind(user)[layer.facts.input] is node and dim == layer.facts.input_dim % len(shape_of(node))
    return reads and held[layer.weight].dim() == 2


def reads_size(user: fx.Node, node: fx.Node, dim: int) -> bool:
    """Whether `user` asks for a size of `node` other than the channels'."""
    return kind_of(user) == "size" and bind(user)["dim"] % len(shape_of(node)) != dim
