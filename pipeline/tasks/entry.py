"""Where model, data and task meet: one real batch goes through the model before anything is spent.

Whatever cannot work together is refused here, by name: inputs that `forward` does not take, outputs that fit no target,
sizes that the model does not bear. What the batch shows is written into the three: names of inputs and outputs, the
task, the sizes of free dimensions.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from foundation.errors import ConfigError, ModelError, first_line, nearest
from pipeline.data.parts import ONE_IMAGE, SINGLE, Data, Inputs
from pipeline.models.calling import Call, adapted, bound, flattened, named
from pipeline.models.from_code import user_code
from pipeline.models.named_inputs import NamedInputs
from pipeline.models.source import Input, ModelSource
from pipeline.models.trial import run
from pipeline.recipe.data import DataSection
from pipeline.recipe.task import TaskSection
from pipeline.tasks import find
from pipeline.tasks.task import Task

BATCH = 2
"""Samples of the batch that is tried; a batch of one hides what a model does with several."""


def meet(source: ModelSource, data: Data, cfg: DataSection, wanted: TaskSection) -> tuple[ModelSource, Data, Task]:
    """Model, data and task as the stages take them. Raises UserError where they do not fit; `UnsuitedError` where the
    model fails on the data's inputs.
    """
    batch, target = next(data.some("train", BATCH).batches("train", BATCH))
    if not data.labelled:
        target = None
    with user_code(source.spec, ModelError):  # what builds or describes a module may be code of theirs
        built = source.build()
        source, data, call = _named(source, data, built)
        model = adapted(call, built)
    inputs = tuple(_ended(one, values) for one, values in zip(source.inputs, batch, strict=True))
    source, data = replace(source, inputs=inputs), replace(data, inputs=inputs)
    outputs = named(run(model, batch, source.spec, _hint(source.inputs)))
    task = find.choose(wanted, data, outputs, target, source.spec, len(batch[0]), image=data.input_size is not None)
    if not wanted.keep_outputs and set(task.reads) != set(outputs):
        kept = tuple(name for name in outputs if name in task.reads)
        source = replace(source, adapt=partial(adapted, replace(call, keep=kept)))
        outputs = {name: outputs[name] for name in kept}
    source = replace(source, outputs=tuple(outputs))
    source = replace(source, sizes=_sizes(source, data, cfg, batch, model))
    digest = hashlib.sha256(
        repr((source.fingerprint, source.inputs, source.outputs, source.sizes, data.fed.args, data.fed.kwargs)).encode()
    )
    return replace(source, fingerprint=digest.hexdigest()), data, task


def _named(source: ModelSource, data: Data, model: nn.Module) -> tuple[ModelSource, Data, Call]:
    """Inputs by the names of the model's forward, which is checked to take them."""
    given = [one.name for one in data.inputs]
    own = [one.name for one in source.inputs]
    order: tuple[int, ...] | None = None
    if isinstance(model, NamedInputs) or source.origin.outputs is not None:
        if not any(given) and len(given) == len(own):
            given = own
        if isinstance(model, NamedInputs):
            bound(model.net, 0, [name or SINGLE for name in given], source.spec)
        elif set(given) != set(own):
            wrong = next((name for name in given if name not in own), "")
            listed = ", ".join(name or "(no name)" for name in given)
            raise ModelError(
                f"{source.spec} takes {', '.join(own)}; the data gives {listed}.",
                nearest(wrong, own) or "Return a mapping with these names.",
            )
        else:
            order = tuple(given.index(name) for name in own)
            order = None if order == tuple(range(len(own))) else order
        tree = flattened(tuple(range(len(given))), {})[2]
        ends = {one.name: one.last for one in source.inputs}
        inputs = tuple(replace(o, name=name, last=ends.get(name)) for o, name in zip(data.inputs, given, strict=True))
    else:
        if len(data.inputs) == len(data.fed.kwargs) == 1 and _takes_one(model, data.fed.kwargs[0]):
            data = replace(data, fed=ONE_IMAGE)
        by_position = bound(model, data.fed.args, data.fed.kwargs, source.spec)
        tree = data.fed.tree
        single = len(data.inputs) == 1 and data.fed.args == 1
        spare = iter(by_position)
        inputs = tuple(replace(one, name=one.name or (SINGLE if single else next(spare))) for one in data.inputs)
    call = Call(tuple(one.name for one in inputs), tree, None, source.origin.outputs, order)
    source = replace(source, inputs=inputs, adapt=partial(adapted, call))
    return source, replace(data, inputs=inputs), call


def _ended(one: Input, values: Tensor) -> Input:
    """`one` with the token that ends its sentences in `values`, (samples, length), before what fills them up: where it
    stands nowhere else in any of them, a classifier may look for it.
    """
    if one.kind != "tokens" or values.dim() != 2 or len(values) < 2 or not values.shape[1]:
        return one
    found = {_ending(row) for row in values.tolist()}
    return replace(one, last=found.pop()) if len(found) == 1 and None not in found else one


def _ending(row: Sequence[int]) -> int | None:
    """The last token before what fills the row up, a run of another one; None where it stands elsewhere as well."""
    end = len(row) if row.count(row[-1]) == 1 else next((n for n in range(len(row), 0, -1) if row[n - 1] != row[-1]), 0)
    return row[end - 1] if end and row.count(row[end - 1]) == 1 else None


def _takes_one(model: nn.Module, name: str) -> bool:
    """Whether there is only one place for the only input, which forward knows under another name than `name`."""
    kinds = inspect.Parameter
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.name == name or p.kind in (kinds.VAR_KEYWORD, kinds.VAR_POSITIONAL) for p in parameters):
        return False
    needed = [p for p in parameters if p.default is p.empty]
    return len(needed) == 1 and needed[0].kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)


def _hint(inputs: tuple[Input, ...]) -> str:
    if len(inputs) == 1 and inputs[0].kind == "float" and len(inputs[0].shape) == 3:
        return "Set data.input_size to one that it takes."
    given = ", ".join(f"{one.name} {'x'.join(map(str, one.shape))} ({one.kind})" for one in inputs)
    return f"A sample gives {given}: let the data set return what the model's forward takes."


def _sizes(
    source: ModelSource, data: Data, cfg: DataSection, batch: Inputs, model: nn.Module
) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Free dimension -> sizes that `model` is proven at, the usual one first. Raises ConfigError for one that fails."""
    names = list(dict.fromkeys(name for one in source.inputs for _, name in one.free))
    for name in cfg.sizes:
        if name not in names:
            raise ConfigError(
                f"data.sizes names a dimension {name!r}; free are {', '.join(names) or 'none'}.",
                "Name free dimensions in data.dims first.",
            )
    found: list[tuple[str, tuple[int, ...]]] = []
    for name in names:
        usual = next(one.shape[place] for one in source.inputs for place, free in one.free if free == name)
        if name in cfg.sizes:
            for size in cfg.sizes[name]:
                problem = _fails(model, source.inputs, batch, name, size)
                if problem:
                    raise ConfigError(
                        f"data.sizes: {source.spec} does not take {name} = {size}: {problem}",
                        "Give sizes that it takes.",
                    )
            found.append((name, tuple(dict.fromkeys(cfg.sizes[name]))))
            continue
        seen = dict(data.lengths).get(name, ())
        # Where all samples have one size, others are tried: half and twice, then multiples that strides divide.
        tried = [size for size in seen if size != usual] or [usual // 2, 2 * usual]
        fit = [size for size in tried if size > 0 and not _fails(model, source.inputs, batch, name, size)]
        if not fit:
            raise ConfigError(
                f"{source.spec} takes {name} = {usual} only, not {' or '.join(map(str, tried))}: it is not free.",
                f"Give sizes that it takes: --set 'data.sizes={{{name}=[...]}}', or leave it out of data.dims.",
            )
        found.append((name, tuple(dict.fromkeys((usual, *fit)))))
    return tuple(found)


def _fails(model: nn.Module, inputs: tuple[Input, ...], batch: Inputs, name: str, size: int) -> str:
    """Why the model does not take a batch with the free dimension `name` of that `size`; "" where it does."""
    try:
        with torch.no_grad():
            model(*resized(inputs, batch, {name: size}))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the user's own forward
        return first_line(error)[:200]
    return ""


def resized(inputs: tuple[Input, ...], batch: Inputs, sizes: Mapping[str, int]) -> Inputs:
    """A batch cut or repeated to those sizes of its free dimensions, by name."""
    made: list[Tensor] = []
    for one, value in zip(inputs, batch, strict=True):
        for place, name in one.free:
            if name in sizes:
                at = torch.arange(sizes[name]) % value.shape[1 + place]
                value = value.index_select(1 + place, at)
        made.append(value)
    return tuple(made)
