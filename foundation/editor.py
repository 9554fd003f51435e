"""The only code that builds an exported program: open one, change a copy of it, and get a checked program back.

    editor = Editor(program)                       # the program itself is never changed
    with editor.before(node):
        scale = editor.parameter("scale", tensor)
        new = editor.call(aten.mul.Tensor, node, scale)
    editor.replace(node, new)
    edited = editor.finish()

What `finish` gives, or it raises:
 1. Every node that was there keeps its name, and so do inputs and outputs; an output that was replaced is listed under
    the name of what took its place.
 2. What nothing uses is gone; the user's inputs, in-place writes and assertions stay.
 3. Placeholders stand in torch's order (parameters, buffers, constants, inputs), each has exactly one input spec, each
    spec has its placeholder, and state and constants hold exactly the tensors that the signature names.
 4. Every operator has a fake value, of the shapes that it has now. Only what was changed, and what a changed shape
    reaches, is run again.
 5. Range constraints, example inputs and verifiers are the program's own; the graph passes `lint` and the verifiers.
A result that breaks one of these is a bug of the caller or of this file: ProgramError. An edit whose operands do not
fit is a property of the model, and raises ShapeError with the node; nobody has to look at a graph for it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensor
from torch.export import ExportedProgram, ModuleCallEntry
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputSpec,
    TensorArgument,
)

from foundation.errors import Explained

aten = torch.ops.aten

# In front of the name of every tensor that an edit adds to a state: it is not taken for one of the model's.
ADDED = "leanort_"
_ASSERTIONS = ("_assert", "sym_constrain")
_ORDER = (
    InputKind.TOKEN,
    InputKind.PARAMETER,
    InputKind.BUFFER,
    InputKind.CONSTANT_TENSOR,
    InputKind.CUSTOM_OBJ,
    InputKind.USER_INPUT,
)


class ProgramError(AssertionError):
    """An edited program breaks what every exported program keeps: a bug, never the model's fault."""


class ShapeError(Explained):
    """An edited operator does not take its operands. `node`: its name; `reason`: what it said."""

    def __init__(self, node: str, reason: str) -> None:
        super().__init__(f"The edited graph does not fit together at '{node}' ({reason}).", "Report the model.")
        self.node = node
        self.reason = reason


def writes(node: fx.Node) -> bool:
    """Whether the node's operator changes one of its operands in place."""
    return bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))


def asserts(node: fx.Node) -> bool:
    """Whether the node only checks something: a shape, a symbol's range, a tensor's type."""
    name = getattr(node.target, "__name__", "")
    return node.op == "call_function" and name.startswith(_ASSERTIONS)


def argument(node: fx.Node, name: str) -> Any:
    """The node's argument called `name` in its operator's schema, or its default. KeyError where there is none."""
    for at, declared in enumerate(_schema(node)):
        if declared.name == name:
            return node.args[at] if at < len(node.args) else node.kwargs.get(name, declared.default_value)
    raise KeyError(name)


class Editor:
    """A copy of an exported program in progress.

    `graph`: the copy's graph. It may be changed directly as well: a node without a fake value gets one in `finish`.
    `copies`: the program's own nodes -> their copies. `state`: parameters and persistent buffers by name, to be
    replaced at will; the shapes of the graph follow. Tensors that no placeholder stands for in the end are left out.
    """

    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        self.graph = fx.Graph()
        self.copies: dict[fx.Node, fx.Node] = {}
        self.state: dict[str, Tensor] = dict(program.state_dict)
        self._specs: dict[str, InputSpec] = {s.arg.name: s for s in program.graph_signature.input_specs}
        self._outdated: set[fx.Node] = set()
        self._settled: set[fx.Node] = set()
        self._replaced: dict[fx.Node, Any] = {}  # a node put in another's place -> the value that its readers knew
        self._fakes: dict[Any, Tensor] = {}
        self._runs: dict[Any, Any] = {}
        for node in program.graph.nodes:
            twin = self.graph.node_copy(node, self.copies.__getitem__)
            if twin.name != node.name:
                twin.name = node.name  # fx renames the copy of one called after a builtin (`input`); specs go by names
            self.copies[node] = twin
        self._mode = next((v.fake_mode for v in map(_value, self.graph.nodes) if isinstance(v, FakeTensor)), None)

    # -- what is there ---------------------------------------------------------------------------------------------

    def value(self, node: fx.Node) -> Any:
        """The node's fake value (a tensor with sizes and type but no numbers, a size, or a tuple of them), up to date
        where the node was made by `call`. Raises ShapeError where the operator does not take its operands.
        """
        if "val" not in node.meta or node in self._outdated:
            self._update(node)
        return node.meta["val"]

    def target(self, node: fx.Node) -> str | None:
        """The name in the state, or among the constants, of the tensor that a placeholder stands for; else None."""
        spec = self._specs.get(node.name) if node.op == "placeholder" else None
        return None if spec is None else spec.target

    # -- what is added ---------------------------------------------------------------------------------------------

    def before(self, node: fx.Node) -> AbstractContextManager[Any]:
        """Calls within are put before `node`."""
        return self.graph.inserting_before(node)

    def after(self, node: fx.Node) -> AbstractContextManager[Any]:
        """Calls within are put behind `node`, in their order."""
        return self.graph.inserting_before(node.next)

    def parameter(self, name: str, tensor: Tensor) -> fx.Node:
        """A placeholder for a new parameter (no other has its name in the state: `target` of the node)."""
        parameter = torch.nn.Parameter(tensor, tensor.dtype.is_floating_point)
        return self._hold(f"p_{ADDED}{name}", parameter, InputKind.PARAMETER)

    def constant(self, name: str, tensor: Tensor) -> fx.Node:
        """A placeholder for a tensor that is not trained, kept in the state as a buffer."""
        return self._hold(f"b_{ADDED}{name}", tensor, InputKind.BUFFER)

    def _hold(self, name: str, tensor: Tensor, kind: InputKind) -> fx.Node:
        with self.graph.inserting_before(next(iter(self.graph.nodes))):
            node = self.graph.placeholder(name)
        node.target = node.name  # fx made the name unique; the code that it writes goes by the target
        target = node.name[2:]
        persistent = True if kind == InputKind.BUFFER else None
        self._specs[node.name] = InputSpec(kind, TensorArgument(name=node.name), target, persistent)
        self.state[target] = tensor
        node.meta["val"] = self.fake(tensor, tuple(tensor.shape))
        return node

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A new operator at the insertion point. Its fake value is worked out when somebody asks, at the latest in
        `finish`: its operands may still be about to change their shapes.
        """
        node = self.graph.call_function(target, args, kwargs)
        self._outdated.add(node)
        return node

    # -- what is changed -------------------------------------------------------------------------------------------

    def set_arguments(self, node: fx.Node, **arguments: Any) -> None:
        """Set arguments of `node` by their schema names. KeyError where its operator has no such argument."""
        names = {declared.name: at for at, declared in enumerate(_schema(node))}
        for name, given in arguments.items():
            at = names[name]
            if at < len(node.args):
                node.args = (*node.args[:at], given, *node.args[at + 1 :])
            elif at == len(node.args) and name not in node.kwargs and not _schema(node)[at].kwarg_only:
                node.args = (*node.args, given)
            else:
                node.kwargs = {**node.kwargs, name: given}
        self._outdated.add(node)

    def retarget(self, node: fx.Node, target: Callable[..., Any], *args: Any) -> None:
        """Make `node` another operator that gives the same: name, readers and fake value stay."""
        node.target, node.args, node.kwargs = target, args, {}

    def reshape(self, node: fx.Node) -> bool:
        """Make a view a reshape; False where `node` is no view.

        A view holds by the strides that one kernel happened to choose, and after an edit, or with other kernels behind
        it, another may be chosen.
        """
        if node.target is not aten.view.default:
            return False
        self.retarget(node, aten.reshape.default, *node.args, *node.kwargs.values())
        return True

    def replace(self, node: fx.Node, new: fx.Node, readers: Iterable[fx.Node] | None = None) -> None:
        """Put `new` where `node` was read: by `readers`, else by all but what `new` is made of. `node` stays."""
        known = _value(node)
        before = self._replaced.get(new, new.meta.get("val", known))
        # Where the readers that it has already knew another shape, all of them are run again.
        self._replaced[new] = known if _same(before, known) else None
        if readers is None:
            own = _made_of(new, node)
            readers = [reader for reader in node.users if reader not in own]
        for reader in list(readers):
            reader.replace_input_with(node, new)

    def erase(self, node: fx.Node) -> None:
        """Remove a node that nothing reads any more. ProgramError where something does."""
        if node.users:
            raise ProgramError(f"'{node.name}' is still read by {', '.join(n.name for n in node.users)}.")
        self.graph.erase_node(node)
        self._outdated.discard(node)

    # -- fake values -----------------------------------------------------------------------------------------------

    def outdate(self, node: fx.Node) -> None:
        """Have the node's fake value worked out again."""
        self._outdated.add(node)
        self._settled.discard(node)

    def settle(self, node: fx.Node, value: Any) -> None:
        """Give the node a fake value that is known by other means; it is not run, whatever happens to its operands."""
        node.meta["val"] = value
        self._settled.add(node)
        self._outdated.discard(node)

    def fake(self, like: Tensor, shape: tuple[Any, ...]) -> Tensor:
        """A fake tensor of `shape`, `like`'s type and device, in order; one object for all that ask for the same.

        It is made directly, since dispatching `empty` costs ten times as much, and once, since symbolic sizes are slow.
        """
        key = like.dtype, like.device, _sizes(shape)
        if key not in self._fakes:
            if self._mode is None:
                raise ProgramError("The program has no fake value to take its mode from.")
            empty = torch.empty(shape, dtype=like.dtype, device="meta")
            self._fakes[key] = FakeTensor(self._mode, empty, torch.device(like.device))
        return self._fakes[key]

    def _update(self, node: fx.Node) -> None:
        """Bring the node's fake value up to date, and before it those of operands that have none yet."""
        waiting = [node]  # no recursion: a chain of new nodes may be long
        while waiting:
            missing = [n for n in waiting[-1].all_input_nodes if "val" not in n.meta]
            if missing:
                waiting += missing
                continue
            at = waiting.pop()
            at.meta["val"] = self._run(at)
            self._outdated.discard(at)

    def _run(self, node: fx.Node) -> Any:
        """The node on its operands' fake values, once for all nodes that do the same to the same: layers repeat."""
        sources: list[Any] = [n.meta["val"] for n in node.all_input_nodes]
        plain = all(type(v) is FakeTensor and v.is_contiguous() for v in sources)
        if not plain or writes(node):
            return self._run_now(node)
        place = {n: k for k, n in enumerate(node.all_input_nodes)}
        shapes = tuple((v.dtype, v.device, _sizes(v.shape)) for v in sources)
        arguments = fx.node.map_arg((node.args, node.kwargs), lambda n: f"operand {place[n]}")
        key = (node.target, shapes, repr(arguments))
        if key not in self._runs:
            self._runs[key] = self._run_now(node)
        return self._runs[key]

    def _run_now(self, node: fx.Node) -> Any:
        args: Any = fx.node.map_arg(node.args, lambda n: n.meta["val"])
        kwargs: Any = fx.node.map_arg(node.kwargs, lambda n: n.meta["val"])
        mode = self._mode if self._mode is not None else nullcontext()
        # Without the Python dispatcher some operators (padding) ask in C++ for a size, which fixes a free batch.
        with mode, torch.no_grad(), enable_python_dispatcher():
            try:
                return node.target(*args, **kwargs)  # type: ignore[operator]
            except Exception as error:  # whatever the operator raises says that it does not take these operands
                raise ShapeError(node.name, f"{type(error).__name__}: {error}") from error

    def _refresh(self) -> None:
        """Fake values of all that changed, in the graph's order; a value of other sizes or type reaches its readers."""
        for node in self.graph.nodes:
            known = self._replaced[node] if node in self._replaced else _value(node)
            if node.op == "placeholder":
                tensor, fake = self.state.get(self.target(node) or ""), _value(node)
                if tensor is not None and (not isinstance(fake, Tensor) or fake.shape != tensor.shape):
                    node.meta["val"] = self.fake(tensor, tuple(tensor.shape))
            elif node.op == "call_function":
                if "unbacked_bindings" in node.meta and "val" in node.meta:
                    continue  # a number read off data: to run it again would give it another symbol
                if node in self._outdated or "val" not in node.meta:
                    node.meta["val"] = self._run(node)
            if not _same(known, _value(node)):
                self._outdated.update(n for n in node.users if n not in self._settled)

    # -- the program -----------------------------------------------------------------------------------------------

    def finish(self) -> ExportedProgram:
        """The edited program (see the top of this file). Raises ShapeError, and ProgramError for a bug."""
        self._remove_unused()
        self._order_placeholders()
        self._refresh()
        inputs = [self._specs[n.name] for n in self._placeholders()]
        outputs = self._output_specs()
        used = {s.target for s in inputs if s.target is not None}
        state = {name: tensor for name, tensor in self.state.items() if name in used}
        constants = {name: value for name, value in self.program.constants.items() if name in used}
        self._check(inputs, outputs, {*state, *constants})
        try:
            return ExportedProgram(
                root=self.program.graph_module,  # bodies of higher-order operators
                graph=self.graph,
                graph_signature=ExportGraphSignature(inputs, outputs),
                state_dict=state,
                range_constraints=copy.copy(self.program.range_constraints),
                # The first entry is the model's own call, the others those of modules whose nodes may be gone.
                module_call_graph=[_own_entry(self.program.module_call_graph[0])],
                example_inputs=self.program.example_inputs,
                constants=constants,
                verifiers=self.program.verifiers,
            )
        except Exception as error:  # torch lints the graph and runs the verifiers here
            raise ProgramError(f"torch does not take the edited program: {error}") from error

    def _remove_unused(self) -> None:
        inputs = set(self.program.graph_signature.user_inputs)
        for node in reversed(list(self.graph.nodes)):
            kept = node.users or node.op == "output" or writes(node) or asserts(node)
            if not kept and not (node.op == "placeholder" and node.name in inputs):
                self.graph.erase_node(node)

    def _placeholders(self) -> list[fx.Node]:
        """The graph's placeholders. ProgramError where one has no input spec."""
        nodes = [n for n in self.graph.nodes if n.op == "placeholder"]
        for node in nodes:
            if node.name not in self._specs:
                raise ProgramError(f"The placeholder '{node.name}' has no input spec.")
        return nodes

    def _order_placeholders(self) -> None:
        rank = {kind: at for at, kind in enumerate(_ORDER)}
        nodes = self._placeholders()
        first = next(n for n in self.graph.nodes if n.op != "placeholder")
        for node in sorted(nodes, key=lambda n: rank[self._specs[n.name].kind]):
            first.prepend(node)

    def _output_specs(self) -> list[OutputSpec]:
        """The program's output specs, named after the nodes that are in the outputs' places now."""
        specs: list[OutputSpec] = []
        for spec, node in zip(self.program.graph_signature.output_specs, _outputs(self.graph), strict=True):
            if isinstance(node, fx.Node) and spec.arg.name != node.name:
                spec = dataclasses.replace(spec, arg=dataclasses.replace(spec.arg, name=node.name))
            specs.append(spec)
        return specs

    def _check(self, inputs: Sequence[InputSpec], outputs: Sequence[OutputSpec], held: set[str]) -> None:
        """Raise ProgramError where a promise of `finish` is broken that torch does not look at."""
        names = [n.name for n in self._placeholders()]
        lost = [name for name in self.program.graph_signature.user_inputs if name not in names]
        if [s.arg.name for s in inputs] != names or lost:
            raise ProgramError(f"Placeholders and input specs differ; missing inputs: {lost}.")
        for node in self.graph.nodes:
            if node.op == "call_function" and "val" not in node.meta:
                raise ProgramError(f"'{node.name}' has no fake value.")
        named = {s.target for s in inputs if s.target is not None and s.kind != InputKind.TOKEN}
        if named != held:
            raise ProgramError(f"Tensors and input specs differ: {sorted(map(str, named ^ held))}.")
        twins = {twin: node for node, twin in self.copies.items()}
        for spec, node in zip(outputs, _outputs(self.graph), strict=True):
            own = twins.get(node)
            if isinstance(node, fx.Node) and (spec.arg.name != node.name or (own and own.name != node.name)):
                raise ProgramError(f"The output '{spec.arg.name}' is '{node.name}' in the graph.")


def _schema(node: fx.Node) -> Sequence[Any]:
    """The declared arguments of the node's operator."""
    target: Any = node.target
    declared: Sequence[Any] = target._schema.arguments
    return declared


def _value(node: fx.Node) -> Any:
    return node.meta.get("val")


def _outputs(graph: fx.Graph) -> Sequence[Any]:
    """What the graph returns."""
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    returned: Any = output.args[0]
    values: Sequence[Any] = returned
    return values


def _own_entry(entry: ModuleCallEntry) -> ModuleCallEntry:
    """A copy with arguments of its own: torch renames them in place when it merges two reads of one output."""
    if entry.signature is None:
        return entry
    inputs, outputs = ([copy.copy(a) for a in args] for args in (entry.signature.inputs, entry.signature.outputs))
    return dataclasses.replace(entry, signature=dataclasses.replace(entry.signature, inputs=inputs, outputs=outputs))


def _made_of(new: fx.Node, node: fx.Node) -> set[fx.Node]:
    """`new` and what it is made of, as far as that stands behind `node` in the graph."""
    found: set[fx.Node] = set()
    waiting = [new]
    while waiting:
        at = waiting.pop()
        if at not in found:
            found.add(at)
            waiting += [source for source in at.all_input_nodes if node < source]
    return found


def _sizes(shape: Sequence[Any]) -> tuple[Any, ...]:
    """Sizes that can be compared: whole numbers, and the expressions of symbolic ones (to compare those fixes them)."""
    return tuple(s if isinstance(s, int) else s.node.expr for s in shape)


def _same(a: Any, b: Any) -> bool:
    """Whether two fake values are alike in type and sizes."""
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and _sizes(a.shape) == _sizes(b.shape)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt):
        return bool(a.node.expr == b.node.expr)
    return type(a) is type(b) and not isinstance(a, (torch.SymInt, torch.SymFloat, torch.SymBool)) and a == b
