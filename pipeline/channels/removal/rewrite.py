"""Cut: slice every parameter and buffer, fix every constant of the graph, and make an exported program of what is
left.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, TensorArgument

from pipeline.channels.coupling.frozen import frozen_part
from pipeline.channels.coupling.groups import Analysis, Removed
from pipeline.channels.dead.constants import Reader, Shift
from pipeline.channels.dead.refusal import Refusal
from pipeline.channels.operators.cut import Cut
from pipeline.channels.operators.table import base_name, bind, find, writes
from pipeline.channels.operators.values import Flags, Value
from pipeline.channels.program.capture import Captured
from pipeline.channels.program.execute import execute, feeds_of, run_program
from pipeline.channels.removal.ledger import Fold, Ledger
from pipeline.channels.removal.verify import Shifts, zero_check
from pipeline.errors import RefusedError

aten = torch.ops.aten
_ASSERTIONS = ("_assert", "sym_constrain", "_assert_tensor_metadata")


@dataclass(frozen=True)
class Shrunk:
    """A physically smaller program, the ledger of what went, and what stayed although it was asked to go."""

    program: ExportedProgram
    ledger: Ledger
    refused: tuple[Refusal, ...]
    example: tuple[Any, ...]

    def __call__(self, *inputs: Any, dtype: torch.dtype | None = None) -> Any:
        """The outputs for `inputs`; one tensor where the graph has one output, else a tuple."""
        return run_program(self.program, inputs, None, dtype)


def shrink(
    captured: Captured,
    analysis: Analysis,
    removed: Removed,
    *,
    check_zero: bool = True,
    refused: tuple[Refusal, ...] = (),
) -> Shrunk:
    """`captured` without the groups flagged in `removed` (cluster name -> bool array, True = goes).

    `captured`: the analysed model, its state folded (see `Captured.fold`). A group that is zero where it is summed
    goes; a group that is one constant goes where a bias can take it (`ledger.folds`); any other stays, and is listed in
    `ledger.refusals`. The last of a dimension stays, too (`ledger.spared`). `refused`: refusals that were found before
    (see `liveness`), for the ledger. `check_zero=False` is for the control experiment only: it shows what the check is
    worth. Raises RefusedError where the graph cannot be edited.
    """
    if captured.program.graph is not analysis.captured.program.graph:
        raise ValueError("the analysis is of another capture")
    gone = analysis.gone(removed)
    going = _by_cluster(analysis, gone)
    spared = {
        name: tuple(np.setdiff1d(np.flatnonzero(flags), going.get(name, ())).tolist())
        for name, flags in removed.items()
    }
    shifts: Shifts = {}
    if check_zero:
        gone, more, shifts = zero_check(captured, analysis, gone, removed)
        refused = (*refused, *more)
    return _Cutter(captured, analysis, gone, shifts).run(refused, {n: s for n, s in spared.items() if s})


def _by_cluster(analysis: Analysis, gone: Flags) -> dict[str, tuple[int, ...]]:
    """Cluster name -> the groups that are gone, where any is."""
    by_class = np.zeros(analysis.solution.reason_of.shape[0], np.bool_)
    by_class[analysis.solution.class_of[gone]] = True
    found = {name: np.flatnonzero(by_class[members]) for name, members in analysis.members.items()}
    return {name: tuple(groups.tolist()) for name, groups in found.items() if groups.size}


class _Cutter:
    """One removal: new graph, new state, new signature."""

    def __init__(self, captured: Captured, analysis: Analysis, gone: Flags, shifts: Shifts) -> None:
        self.captured = captured
        self.analysis = analysis
        self.gone = gone
        self.shifts = shifts
        self.raised: dict[str, Tensor] = {}  # parameter -> what is added to its kept part
        self.folds: list[Fold] = []
        self.trace = analysis.trace
        self.old: fx.Graph = captured.program.graph
        self.graph = fx.Graph()
        self.new_of: dict[fx.Node, fx.Node] = {}
        self.added: list[tuple[fx.Node, InputSpec, Tensor]] = []
        self.frozen: dict[str, str] = {}
        self.fakes: dict[Any, Tensor] = {}
        self.runs: dict[Any, Any] = {}
        self.cut = Cut(gone, self.trace.values, self.trace.notes, self.graph, self.new_of, self._constant)

    def run(self, refused: tuple[Refusal, ...], spared: Mapping[str, tuple[int, ...]]) -> Shrunk:
        self._copy()
        self._edit()
        for reader, shift in self.shifts.values():
            self._fold(reader, shift)
        state, kept = self._slice()
        program = self._program(state)
        names = set(program.graph_signature.parameters) | set(program.graph_signature.buffers)
        shapes = {n: tuple(v.shape) for n, v in self.captured.state.items()}
        ledger = Ledger(
            shapes=shapes,
            kept={n: k for n, k in kept.items() if n in names},
            groups=_by_cluster(self.analysis, self.gone),
            rewrites=tuple(self.cut.rewrites),
            refusals=refused,
            spared=spared,
            folds=tuple(self.folds),
            frozen=self.frozen,
            dropped=tuple(n for n in shapes if n not in names),
            rounded=bool(self.folds) or any(t.dtype.is_floating_point for _, _, t in self.added),
        )
        return Shrunk(program, ledger, refused, self.captured.example)

    # -- the graph -------------------------------------------------------------------------------------------------

    def _copy(self) -> None:
        """A copy of the graph without assertions, frozen tensors in the place of their computation."""
        frozen, edge = frozen_part(self.old, self.trace, self.cut.touched)
        replaced = self._frozen_values(edge)
        for node in self.old.nodes:
            if node.op == "call_function" and base_name(node.target).startswith(_ASSERTIONS):
                continue
            if node in replaced:
                self.new_of[node] = self._parameter(f"{node.name}_frozen", replaced[node], node)
                continue
            if node in frozen:
                continue
            sliced = self._static(node)
            if sliced is not None:
                self.new_of[node] = self._constant(f"{node.name}_kept", sliced)
                continue
            copied = self.new_of[node] = self.graph.node_copy(node, self.new_of.__getitem__)
            if node.op == "placeholder" and copied.name != node.name:
                copied.name = node.name  # the copy of one called after a builtin (`input`) would be renamed

    def _static(self, node: fx.Node) -> Tensor | None:
        """The kept part of a constant computed from nothing, where a part of it goes."""
        value = self.trace.values.get(node)
        if node not in self.trace.static or not isinstance(value, Value) or not self.cut.touched(value):
            return None
        return self._kept_part(self.trace.static[node], value)

    def _kept_part(self, tensor: Tensor, value: Value) -> Tensor:
        for dim, atoms in enumerate(value.atoms):
            keep = self.cut.keep(atoms)
            if keep is not None:
                tensor = tensor.index_select(dim, torch.from_numpy(np.flatnonzero(keep)))
        return tensor.contiguous()

    def _frozen_values(self, edge: list[fx.Node]) -> dict[fx.Node, Tensor]:
        """What the rest of the graph uses of the frozen part, computed on the folded weights at full size,
        then sliced.
        """
        if not edge:
            return {}
        needed: set[fx.Node] = set()
        stack = list(edge)
        while stack:
            node = stack.pop()
            if node not in needed:
                needed.add(node)
                stack += node.all_input_nodes
        found: dict[fx.Node, Tensor] = {}

        def watch(node: fx.Node, value: Any) -> None:
            if node in edge:
                found[node] = self._kept_part(value, self.trace.values[node])

        feeds = feeds_of(self.captured.program, self.captured.example, self.captured.state)
        execute(self.old, feeds, watch=watch, only=needed)
        return found

    # -- added tensors ---------------------------------------------------------------------------------------------

    def _constant(self, name: str, tensor: Tensor) -> fx.Node:
        return self._add(name, tensor, InputKind.BUFFER, None)

    def _parameter(self, name: str, tensor: Tensor, source: fx.Node, *, computed: bool = True) -> fx.Node:
        node = self._add(name, tensor, InputKind.PARAMETER, source)
        if computed:
            self.frozen[str(self.added[-1][1].target)] = source.name
        return node

    def _add(self, name: str, tensor: Tensor, kind: InputKind, source: fx.Node | None) -> fx.Node:
        target = f"leanort_{name}"
        with self.graph.inserting_before(next(iter(self.graph.nodes), None)):
            node = self.graph.placeholder(f"{'p' if kind == InputKind.PARAMETER else 'b'}_{target}")
        spec = InputSpec(
            kind, TensorArgument(name=node.name), target, persistent=True if kind == InputKind.BUFFER else None
        )
        self.added.append((node, spec, tensor))
        return node

    def _edit(self) -> None:
        """Every operator whose tensors lose something fixes its constants."""
        values = self.trace.values
        for node in self.old.nodes:
            if node not in values or node not in self.new_of or node in self.trace.static:
                continue
            if self.new_of[node].op == "placeholder":
                continue
            if base_name(node.target).startswith("sym_size"):
                self._original_size(node)
                continue
            rule = find(node.target)
            if rule is None or rule.edit is None:
                continue
            if self.cut.touched(values.get(node)) or any(self.cut.touched(values.get(s)) for s in node.all_input_nodes):
                try:
                    rule.edit(self.cut, node)
                except (ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
                    raise RefusedError(
                        f"{node.target} at '{node.name}' cannot be rewritten ({type(error).__name__}: {error}).",
                        "Exclude the channels around it, or report the model.",
                    ) from error

    def _original_size(self, node: fx.Node) -> None:
        """Sizes read at run time keep meaning the original ones; each use of a size is corrected where it is used."""
        source: Any = node.args[0]
        value = self.trace.values.get(source)
        if not isinstance(value, Value):
            return
        dim = bind(node)["dim"] % len(value.shape)
        before, kept = value.shape[dim], self.cut.count(value.atoms[dim], value.shape[dim])
        if kept == before:
            return
        new = self.new_of[node]
        users = list(new.users)
        with self.graph.inserting_before(new.next):
            whole = self.cut.size(new, before, kept)
        for user in users:
            user.replace_input_with(new, whole)
        self.new_of[node] = whole

    def _fold(self, reader: Reader, shift: Shift) -> None:
        """Give `reader` what the constant channels before it gave: in its bias, in one made for it, or in a sum."""
        node, name = reader.node, base_name(reader.node.target)
        out = self.trace.value(node)
        dim = 1 if "conv" in name else len(out.shape) - (2 if shift.rows else 1)
        keep = self.cut.keep(out.atoms[dim])
        amount = shift.amount if keep is None else shift.amount[torch.from_numpy(np.flatnonzero(keep))]
        if not bool((amount != 0).any()):
            return
        dtype = node.meta["val"].dtype
        takes_bias = "bias" in bind(node)
        bias = bind(node)["bias"] if takes_bias else None
        own = self._own_parameter(bias, node)
        created = own is None
        if own is not None:
            self.raised[own] = amount
        elif takes_bias and bias is None:
            added = self._parameter(f"{node.name}_bias", amount.to(dtype), node, computed=False)
            self.cut.set(node, bias=added)
        else:
            wide = amount.to(dtype).reshape(-1, *[1] * (len(out.shape) - 1 - dim))
            added = self._parameter(f"{node.name}_shift", wide, node, computed=False)
            self.cut.replace(node, lambda new: self.cut.call(aten.add.Tensor, new, added), "plus folded constants")
        self.folds.append(
            Fold(
                parameter=own if own is not None else str(self.added[-1][1].target),
                op=name,
                node=node.name,
                created=created,
                amounts=tuple(amount.tolist()),
                constants=self._constants(reader, shift),
            )
        )

    def _own_parameter(self, bias: Any, node: fx.Node) -> str | None:
        """The name of a bias parameter that `node` alone uses, under one name."""
        if not isinstance(bias, fx.Node) or bias.op != "placeholder" or set(bias.users) != {node}:
            return None
        signature = self.captured.program.graph_signature
        name = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}.get(bias.name)
        if name is None:
            return None
        pointer = self.captured.program.state_dict[name].data_ptr()
        same = [n for n, v in self.captured.program.state_dict.items() if v.data_ptr() == pointer and v.numel()]
        return name if len(same) == 1 and len(self.captured.state[name].shape) == 1 else None

    def _constants(self, reader: Reader, shift: Shift) -> dict[str, dict[int, float]]:
        """Cluster -> {group: its constant}, of what went at this reader."""
        atoms = self.trace.value(reader.source).atoms[reader.dim]
        assert atoms is not None
        of_class = {
            int(c): float(v)
            for c, v in zip(self.analysis.solution.class_of[atoms], shift.constants, strict=True)
            if v != 0
        }
        found = {
            name: {g: of_class[c] for g, c in enumerate(classes.tolist()) if c in of_class}
            for name, classes in self.analysis.members.items()
        }
        return {name: groups for name, groups in found.items() if groups}

    # -- the state and the program ---------------------------------------------------------------------------------

    def _slice(self) -> tuple[dict[str, Tensor], dict[str, dict[int, tuple[int, ...]]]]:
        kept: dict[str, dict[int, tuple[int, ...]]] = {}
        indices: dict[str, dict[int, Tensor]] = {}
        for slot in self.analysis.slots:
            keep = self.cut.keep(slot.atoms)
            if keep is not None:
                stay = np.flatnonzero(keep)
                kept.setdefault(slot.name, {})[slot.dim] = tuple(stay.tolist())
                indices.setdefault(slot.name, {})[slot.dim] = torch.from_numpy(stay)
        parameters = set(self.captured.program.graph_signature.parameters)
        state: dict[str, Tensor] = {}
        cut_once: dict[tuple[int, tuple[int, ...]], Tensor] = {}
        for name, tensor in self.captured.state.items():
            key = (tensor.data_ptr(), tuple(tensor.shape))
            if key not in cut_once:  # tied weights stay tied
                small = tensor.detach()
                for dim, places in indices.get(name, {}).items():
                    small = small.index_select(dim, places)
                if name in self.raised:
                    small = (small.to(torch.float64) + self.raised[name]).to(small.dtype)
                floating = small.dtype.is_floating_point
                cut_once[key] = torch.nn.Parameter(small, floating) if name in parameters else small
            state[name] = cut_once[key]
        return state, kept

    def _program(self, state: dict[str, Tensor]) -> ExportedProgram:
        program: ExportedProgram = self.captured.program
        signature = program.graph_signature
        for _, spec, tensor in self.added:
            state[str(spec.target)] = torch.nn.Parameter(tensor) if spec.kind == InputKind.PARAMETER else tensor
        self._remove_dead()
        for node in self.graph.nodes:
            if node.target is aten.view.default:  # held by the strides of a kernel, and now another one may be chosen
                node.target, node.args, node.kwargs = aten.reshape.default, (*node.args, *node.kwargs.values()), {}
        placeholders = {n.name for n in self.graph.nodes if n.op == "placeholder"}
        specs = [s for _, s, _ in self.added] + list(signature.input_specs)
        by_name = {s.arg.name: s for s in specs}
        self._order(by_name)
        ordered = [by_name[n.name] for n in self.graph.nodes if n.op == "placeholder" and n.name in placeholders]
        outputs = output_specs(signature, self.graph)
        used = {s.target for s in ordered if s.target is not None}
        state = {n: v for n, v in state.items() if n in used}
        constants = {n: v for n, v in program.constants.items() if n in used}
        self._meta(ordered, state)
        return ExportedProgram(
            root=torch.nn.Module(),
            graph=self.graph,
            graph_signature=ExportGraphSignature(ordered, outputs),
            state_dict=state,
            range_constraints=copy.copy(program.range_constraints),
            module_call_graph=[program.module_call_graph[0]],
            example_inputs=program.example_inputs,
            constants=constants,
            verifiers=program.verifiers,
        )

    def _remove_dead(self) -> None:
        inputs = set(self.captured.program.graph_signature.user_inputs)
        for node in reversed(list(self.graph.nodes)):
            if node.users or node.op == "output":
                continue
            if node.op == "call_function" and writes(node):
                continue
            if node.op == "placeholder" and node.name in inputs:
                continue
            self.graph.erase_node(node)

    def _order(self, specs: Mapping[str, InputSpec]) -> None:
        """Placeholders in the order an exported program wants: parameters, buffers, constants, inputs."""
        rank = {InputKind.PARAMETER: 0, InputKind.BUFFER: 1, InputKind.CONSTANT_TENSOR: 2}
        nodes = [n for n in self.graph.nodes if n.op == "placeholder"]
        nodes.sort(key=lambda n: rank.get(specs[n.name].kind, 3))
        first = next(n for n in self.graph.nodes)
        for node in nodes:
            if node is not first:
                first.prepend(node)
        if nodes and first in nodes:
            at = nodes.index(first)
            if at:
                nodes[at - 1].append(first)
            for node in reversed(nodes[at + 1 :]):
                first.append(node)

    def _meta(self, specs: list[InputSpec], state: Mapping[str, Tensor]) -> None:
        """Fake tensors of the new shapes. Rewritten nodes are run on fake tensors; the others' shapes
        follow from their atoms.
        """
        mode = next(
            n.meta["val"].fake_mode
            for n in self.old.nodes
            if n.op == "placeholder" and isinstance(n.meta.get("val"), FakeTensor)
        )
        targets = {s.arg.name: s.target for s in specs}
        known = {new: old for old, new in self.new_of.items() if self.trace.values.get(old) is not None}
        for node in self.graph.nodes:
            if node.op == "placeholder":
                tensor = state.get(targets[node.name] or "")
                val = node.meta.get("val")
                if tensor is not None and (not isinstance(val, Tensor) or val.shape != tensor.shape):
                    node.meta["val"] = self._fake_once(mode, tensor, tuple(tensor.shape))
            elif node.op == "call_function":
                old = known.get(node)
                value = self.trace.values.get(old) if old is not None else None
                if "unbacked_bindings" in node.meta and value is None:
                    continue  # a number read off data: running it again would give it another symbol
                if old is not None and "val" in node.meta:
                    node.meta = {**node.meta, "val": self._smaller(mode, node.meta["val"], value)}
                else:
                    node.meta["val"] = self._run_once(mode, node)

    def _smaller(self, mode: Any, val: Any, value: Any) -> Any:
        """A node's fake tensor(s) at the kept counts."""
        if isinstance(val, (tuple, list)):
            return type(val)(self._smaller(mode, v, w) for v, w in zip(val, value, strict=True))
        if not isinstance(value, Value) or not self.cut.touched(value):
            return val
        shape = tuple(
            s if self.cut.keep(a) is None or not isinstance(s, int) else self.cut.count(a, n)
            for s, a, n in zip(val.shape, value.atoms, value.shape, strict=True)
        )
        mixed = [
            d for d, s in enumerate(val.shape) if not isinstance(s, int) and self.cut.keep(value.atoms[d]) is not None
        ]
        for d in mixed:  # batch × channels: the symbol scales with the share that is kept
            n = value.shape[d]
            shape = (*shape[:d], val.shape[d] * self.cut.count(value.atoms[d], n) // n, *shape[d + 1 :])
        return self._fake_once(mode, val, shape)

    def _run_once(self, mode: Any, node: fx.Node) -> Any:
        """`run_fake`, once for all nodes that do the same to tensors of the same shapes: layers repeat."""
        sources: list[Any] = [n.meta["val"] for n in node.all_input_nodes]
        plain = all(type(v) is FakeTensor and v.is_contiguous() for v in sources)
        if not plain or writes(node):
            return run_fake(mode, node)
        place = {n: k for k, n in enumerate(node.all_input_nodes)}
        shapes = tuple((v.dtype, _sizes(v.shape)) for v in sources)
        arguments = fx.node.map_arg((node.args, node.kwargs), lambda n: f"operand {place[n]}")
        key = (node.target, shapes, repr(arguments))
        if key not in self.runs:
            self.runs[key] = run_fake(mode, node)
        return self.runs[key]

    def _fake_once(self, mode: Any, like: Tensor, shape: tuple[Any, ...]) -> Tensor:
        """`_fake`, shared between nodes of one shape: symbolic sizes make it slow."""
        key = like.dtype, _sizes(shape)
        if key not in self.fakes:
            self.fakes[key] = _fake(mode, like, shape)
        return self.fakes[key]


def _sizes(shape: Sequence[Any]) -> tuple[Any, ...]:
    """Sizes that can be compared: whole numbers, and the expressions of symbolic ones."""
    return tuple(s if isinstance(s, int) else s.node.expr for s in shape)


def _fake(mode: Any, like: Tensor, shape: tuple[Any, ...]) -> Tensor:
    """A fake tensor of `shape`, made directly: dispatching `empty` costs ten times as much."""
    fake: Tensor = FakeTensor(mode, torch.empty(shape, dtype=like.dtype, device="meta"), torch.device(like.device))
    return fake


def run_fake(mode: Any, node: fx.Node) -> Any:
    """The node on its operands' fake tensors: what a rewrite put in has its shape checked here."""
    args = fx.node.map_arg(node.args, lambda n: n.meta["val"])
    kwargs = fx.node.map_arg(node.kwargs, lambda n: n.meta["val"])
    with mode, torch.no_grad(), enable_python_dispatcher():  # padding would fix a free batch in C++
        try:
            return node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception as error:
            raise RefusedError(
                f"The shrunk graph does not fit together at '{node.name}' ({type(error).__name__}: {error}).",
                "Report the model; nothing was removed.",
            ) from error


def output_specs(signature: ExportGraphSignature, graph: fx.Graph) -> list[Any]:
    """The output specs, renamed after nodes that a rewrite put in the place of an output's node."""
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    specs = []
    for spec, node in zip(signature.output_specs, output.args[0], strict=True):
        if isinstance(spec.arg, TensorArgument) and isinstance(node, fx.Node) and spec.arg.name != node.name:
            spec = copy.copy(spec)
            spec.arg = TensorArgument(name=node.name)
        specs.append(spec)
    return specs
