"""What torch.onnx or onnxruntime take only in one of several equal forms is brought into that form.

A view holds by the strides that a kernel happened to choose, and torch.onnx works shapes out with other kernels: each
becomes a reshape, of a tensor in order where it comes out of attention (torch.onnx makes views of reshapes before it
takes attention apart). Attention is translated for [batch, heads, tokens, positions] alone: dimensions between the
batch and the tokens are merged into one and taken apart again after it; without heads, one is put in; a mask gets a row
for every query. Chunks of a dimension that depends on the batch become slices, since a split wants its sizes as
numbers; `1.0 - mask` of whole numbers gets its cast. Zeros around a max pooling are written so that onnxruntime does
not take them for its own padding.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch.export import ExportedProgram

aten = torch.ops.aten
_ATTENTION = aten.scaled_dot_product_attention.default
_RESHAPES = {aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints}
_MOVES = {aten.transpose.int, aten.permute.default, aten.contiguous.default}


def translatable(program: ExportedProgram) -> ExportedProgram:
    """`program` in forms that torch.onnx translates: the same function of the same tensors.

    The program itself is not changed; without anything to change it is returned as it is.
    """
    _forget_pending(program)
    graph = copy.deepcopy(program.graph)
    for node, copied in zip(program.graph.nodes, graph.nodes, strict=True):
        if copied.name != node.name:
            copied.name = node.name  # the copy of one called after a builtin (`input`) is renamed; the signature is not
    changed = False
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is aten.view.default:
            node.target, node.args, node.kwargs = aten.reshape.default, (*node.args, *node.kwargs.values()), {}
            changed = True
        if node.target in _RESHAPES:
            changed |= _in_order(graph, node)
        elif node.target in (aten.pad.default, aten.constant_pad_nd.default):
            changed |= _kept_from_fusion(node)
        elif node.target is aten.rsub.Scalar:
            changed |= _promoted(graph, node)
        elif node.target in (aten.chunk.default, aten.split.Tensor):
            changed |= _sliced(graph, node)
        elif node.target is _ATTENTION:
            changed |= _repeated(graph, node)
            changed |= _masked_each(graph, node)
            changed |= _four_dimensional(graph, node)
    if not changed:
        return program
    return ExportedProgram(
        root=program.graph_module,
        graph=graph,
        graph_signature=program.graph_signature,
        state_dict=program.state_dict,
        range_constraints=copy.copy(program.range_constraints),
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )


def _forget_pending(program: ExportedProgram) -> None:
    """A translation leaves sizes read off data noted as pending, and the next one in this process stops at them."""
    for node in program.graph.nodes:
        env = getattr(getattr(node.meta.get("val"), "fake_mode", None), "shape_env", None)
        if env is not None:
            env.pending_fresh_unbacked_symbols.clear()
            return


def _in_order(graph: fx.Graph, node: fx.Node) -> bool:
    """Whether a copy in order, which costs nothing in ONNX, was put before a reshape of what attention gives."""
    source: Any = node.args[0]
    while source.target in _MOVES:
        source = source.args[0]
    if source.target is not _ATTENTION:
        return False
    with graph.inserting_before(node):
        ordered = _put(graph, aten.clone.default, node.args[0], memory_format=torch.contiguous_format)
    node.args = (ordered, *node.args[1:])
    return True


def _kept_from_fusion(node: fx.Node) -> bool:
    """Whether zeros put around what a max pooling reads became negative zeros.

    onnxruntime's Pad_Fusion (1.31) makes zeros the pooling's own padding, which is minus infinity there; it
    knows zeros by their bytes (`onnxruntime/core/optimizer/pad_fusion.cc`), and -0.0 has others.
    """
    if not any("max_pool" in str(user.target) for user in node.users):
        return False
    if (node.target is aten.pad.default and _argument(node, "mode") != "constant") or _argument(node, "value"):
        return False
    node.target, node.args, node.kwargs = aten.constant_pad_nd.default, (*node.args[:2], -0.0), {}
    return True


def _promoted(graph: fx.Graph, node: fx.Node) -> bool:
    """Whether whole numbers that are taken from a fraction were made fractions first, as the operator does inside."""
    source: Any = node.args[0]
    dtype = node.meta["val"].dtype
    if source.meta["val"].dtype == dtype:
        return False
    with graph.inserting_before(node):
        cast = _put(graph, aten.to.dtype, source, dtype)
    node.args = (cast, *node.args[1:])
    return True


def _sliced(graph: fx.Graph, node: fx.Node) -> bool:
    """Whether the pieces of a dimension of no fixed size were made slices."""
    source: Any = node.args[0]
    count: Any = node.args[1]  # of a chunk's pieces; for a split their size
    dim = _argument(node, "dim") % len(source.meta["val"].shape)
    if isinstance(source.meta["val"].shape[dim], int) or any(u.target is not operator.getitem for u in node.users):
        return False
    with graph.inserting_before(node):
        size = count
        if node.target is aten.chunk.default:  # every piece but the last has ceil(n / count)
            whole = _put(graph, aten.sym_size.int, source, dim)
            size = _put(graph, operator.floordiv, _put(graph, operator.add, whole, count - 1), count)
        for piece in list(node.users):
            at: Any = piece.args[1]
            ends = [_put(graph, operator.mul, size, k) if isinstance(size, fx.Node) else size * k for k in (at, at + 1)]
            # The piece keeps its name, which the signature may list among the outputs.
            piece.target, piece.args = aten.slice.Tensor, (source, dim, *ends)
    graph.erase_node(node)
    return True


def _repeated(graph: fx.Graph, node: fx.Node) -> bool:
    """Whether a single head of keys or values, broadcast over the query's, was written out for each of them."""
    query, *others = node.args[:3]
    shape = query.meta["val"].shape  # type: ignore[union-attr]
    if len(shape) != 4 or not isinstance(shape[1], int) or node.kwargs.get("enable_gqa"):
        return False
    changed = False
    for at, source in enumerate(others, start=1):
        if shape[1] > 1 and source.meta["val"].shape[1] == 1:  # type: ignore[union-attr]
            with graph.inserting_before(node):
                wide = _put(graph, aten.expand.default, source, [-1, shape[1], -1, -1])
            node.update_arg(at, wide)
            changed = True
    return changed


def _masked_each(graph: fx.Graph, node: fx.Node) -> bool:
    """Whether a mask of one row for all queries was written out for each: onnxruntime's Attention has no such mask."""
    queries = node.args[0].meta["val"].shape[-2]  # type: ignore[union-attr]
    mask: Any = _argument(node, "attn_mask")
    if not isinstance(mask, fx.Node) or not isinstance(queries, int) or queries == 1:
        return False
    rank = len(mask.meta["val"].shape)
    rows = mask.meta["val"].shape[-2] if rank > 1 else queries
    if not isinstance(rows, int) or rows != 1:
        return False
    with graph.inserting_before(node):
        each = _put(graph, aten.expand.default, mask, [*[-1] * (rank - 2), queries, -1])
    node.replace_input_with(mask, each)
    return True


def _four_dimensional(graph: fx.Graph, node: fx.Node) -> bool:
    """Whether attention of another rank was put on four dimensions; it stays where its operands are broadcast."""
    query, key, value = node.args[:3]
    mask: Any = _argument(node, "attn_mask")
    shapes = [n.meta["val"].shape for n in (query, key, value)]  # type: ignore[union-attr]
    rank = len(shapes[0])
    between = shapes[0][1:-2]
    if rank in (2, 4) or node.kwargs.get("enable_gqa") or not _alike([shape[:-2] for shape in shapes]):
        return False
    if not all(isinstance(n, int) for n in between):
        return False
    if (
        isinstance(mask, fx.Node)
        and len(mask.meta["val"].shape) > 2
        and not _alike([shapes[0][:-2], mask.meta["val"].shape[:-2]])
    ):
        return False

    def merged(source: fx.Node) -> fx.Node:
        if rank == 3:
            return _put(graph, aten.unsqueeze.default, source, 1)
        return _put(graph, aten.flatten.using_ints, source, 1, rank - 3)

    with graph.inserting_before(node):
        operands: list[Any] = [merged(n) for n in (query, key, value)]  # type: ignore[arg-type]
        if isinstance(mask, fx.Node) and len(mask.meta["val"].shape) > 2:
            mask = merged(mask)
        options = {k: v for k, v in node.kwargs.items() if k != "attn_mask"}
        attended = _put(graph, _ATTENTION, *operands, mask, *node.args[4:], **options)
    # The node keeps its name, which the signature may list among the outputs.
    node.kwargs = {}
    if rank == 3:
        node.target, node.args = aten.squeeze.dim, (attended, 1)
    else:
        node.target, node.args = aten.unflatten.int, (attended, 1, list(between))
    return True


def _alike(shapes: list[Any]) -> bool:
    """Whether sizes are equal one by one; symbolic ones only where they are the same expression."""
    plain = [tuple(s if isinstance(s, int) else s.node.expr for s in shape) for shape in shapes]
    return all(p == plain[0] for p in plain)


def _argument(node: fx.Node, name: str) -> Any:
    """The node's argument called `name` in its operator's schema, or its default."""
    for at, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.name == name:
            return node.args[at] if at < len(node.args) else node.kwargs.get(name, argument.default_value)
    raise KeyError(name)


def _put(graph: fx.Graph, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
    """A new node at the insertion point, with its fake result."""
    new = graph.call_function(target, args, kwargs)
    new.meta["val"] = _run(new)
    return new


def _run(node: fx.Node) -> Any:
    """The node's fake result."""
    values: list[Any] = [n.meta["val"] for n in node.all_input_nodes]
    args: Any = fx.node.map_arg(node.args, lambda n: n.meta["val"])
    kwargs: Any = fx.node.map_arg(node.kwargs, lambda n: n.meta["val"])
    tensors: list[Any] = [v for v in values if isinstance(v, torch.Tensor)]
    if not tensors:  # arithmetic on sizes
        return node.target(*args, **kwargs)  # type: ignore[operator]
    with tensors[0].fake_mode, torch.no_grad(), enable_python_dispatcher():  # else a free batch may be fixed
        return node.target(*args, **kwargs)  # type: ignore[operator]
