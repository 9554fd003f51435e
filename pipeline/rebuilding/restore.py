"""The smaller module again: from a dense instance and a structure, or from a folder that it was saved to."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from foundation.errors import ModelError, StoreError, UserError, first_line
from foundation.files import make_folder, read_tensors, save_tensors
from pipeline.artifacts import archive
from pipeline.channels.removal.recover import Trainable
from pipeline.models import find
from pipeline.models.at_home import at_home, own_class
from pipeline.models.source import build_module
from pipeline.rebuilding.fit import fit, tensors
from pipeline.rebuilding.numbers import put
from pipeline.rebuilding.padding import pad
from pipeline.rebuilding.structure import FILE, Structure

WEIGHTS = "model.safetensors"
PROGRAM = "program.pt2"
CONFIG = "config.json"
STRUCTURE = "leanort_structure"
"""Attribute of a smaller module that says how it was made; a deep copy and a pickle of it keep it."""


def restructured(dense: nn.Module, structure: Structure, state: Mapping[str, Tensor]) -> nn.Module:
    """`dense`, in place, as the smaller module with the values `state`, in eval mode.

    Raises ModelError where it is no instance of the class that the structure is of.
    """
    called = f"{type(dense).__module__}.{type(dense).__qualname__}"
    known = {*tensors(dense), *structure.biases.values()}
    lost = [name for name in structure.shapes if name not in known]
    if lost:
        raise ModelError(
            f"The model is a {called} without {lost[0]!r}, and what was pruned is a {structure.kind} that has it.",
            "Give a dense instance of the class that was deployed, built with the same arguments.",
        )
    try:
        put(dense, dict(structure.numbers))
        fit(dense, state)
        pad(dense, structure.padded)
    except (ValueError, KeyError, AttributeError) as error:
        raise ModelError(
            f"The model is not built as the one that was pruned: {first_line(error)}.",
            "Give a dense instance of the class that was deployed, built with the same arguments.",
        ) from error
    return marked(dense, structure).eval()


def marked(module: nn.Module, structure: Structure) -> nn.Module:
    """`module`, which knows from now on how it was made."""
    setattr(module, STRUCTURE, structure)
    return module


def within(structure: Structure, state: Mapping[str, Tensor], prefix: str) -> tuple[Structure, dict[str, Tensor]]:
    """Structure and values of the submodule `prefix`; "" is the whole model."""
    if not prefix:
        return structure, dict(state)
    inner = {name.removeprefix(f"{prefix}."): value for name, value in state.items() if name.startswith(f"{prefix}.")}
    return structure.within(prefix), inner


def dense_instance(structure: Structure) -> tuple[nn.Module, str]:
    """A dense instance of the original class, and the name that it has within the model that was captured ("": it is
    that model itself). Raises ModelError where the model cannot be built from what the structure names.
    """
    if structure.model.startswith("object:"):
        raise ModelError(
            f"The version was made from an object in memory ({structure.model}), which nothing can build again.",
            "Give it: smaller(version, model=MyNet(...)).",
        )
    source = find.load(
        structure.model, num_classes=structure.classes, input_size=structure.input_size, seed=structure.seed
    )
    model = build_module(source.spec, source.origin, source.seed)
    if source.origin.fold is not None:
        source.origin.fold(model)
    return at_home(model)


def save_smaller(module: nn.Module, folder: Path | str) -> Path:
    """Write a module that `smaller` gave into `folder`, as it is now: `model.safetensors` and `structure.json`; a
    transformers model's config beside them; the program, where the module is one. No pickle.

    Raises UserError where the module is none of these, StoreError where it cannot be written.
    """
    folder = Path(folder)
    structure = getattr(module, STRUCTURE, None)
    if not isinstance(structure, Structure):
        raise UserError(
            f"This {type(module).__name__} was not made by smaller().", "Save it as you save any module of yours."
        )
    make_folder(folder)
    save_tensors({name: value.detach() for name, value in module.state_dict().items()}, folder / WEIGHTS)
    structure.write(folder)
    if isinstance(module, Trainable):
        archive.write(module.exported(), folder / PROGRAM)
    elif callable(getattr(module, "save_pretrained", None)):
        config: Any = _telling(module, structure) or module.config
        config.save_pretrained(folder)
    return folder


def _telling(module: Any, structure: Structure) -> Any:
    """A transformers config that says the smaller sizes all by itself, so that `from_pretrained` reads the folder; None
    where no config can (heads that went while the stream stayed, layers of different widths).
    """
    import transformers

    if structure.numbers:  # which no config would set
        return None
    kind = own_class(module)
    before = dict(kind(copy.deepcopy(module.config)).named_parameters())
    sizes: dict[int, set[int]] = {}
    for name, shape in structure.shapes.items():
        for old, new in zip(before[name].shape if name in before else (), shape, strict=False):
            if old != new:
                sizes.setdefault(old, set()).add(new)
    for name, value in vars(module.config).items():
        if type(value) is not int or len(sizes.get(value, ())) != 1:
            continue
        config = copy.deepcopy(module.config)
        setattr(config, name, *sizes[value])
        with contextlib.suppress(ValueError, RuntimeError, ZeroDivisionError):  # what it says of numbers that clash
            if _same_sizes(kind(config), module):
                config.architectures = [kind.__name__]
                config.transformers_version = transformers.__version__
                return config
    return None


def _same_sizes(a: nn.Module, b: nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(one[name].shape == other[name].shape for name in one)


def load_smaller(folder: Path | str, model: nn.Module | None = None) -> nn.Module:
    """What `save_smaller` wrote, in eval mode: the original class where it was one, else the program.

    `model`: a dense instance of the class, changed in place; left out, it is built from the name that was deployed.
    Raises StoreError where a file is missing or damaged, ModelError where the instance is of another kind.
    """
    folder = Path(folder)
    structure = Structure.read(folder)
    state = read_tensors(folder / WEIGHTS)
    if not structure.original:
        made: nn.Module = Trainable(archive.read(folder / PROGRAM))
        fit(made, state)
        return marked(made, structure).eval()
    if model is None:
        model = _from_config(folder, structure) if (folder / CONFIG).is_file() else dense_instance(structure)[0]
    return restructured(model, structure, state)


def _from_config(folder: Path, structure: Structure) -> nn.Module:
    """A transformers model of the class that the structure names, with new weights; no code of the folder is run."""
    import transformers

    name = structure.kind.rpartition(".")[2]
    kind = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise StoreError(f"{folder / FILE} names {name!r}, which is no model of transformers.", "Give model=.")
    made: nn.Module = kind(transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False))
    return made
