"""The module that a user wrote, behind what hands its inputs over."""

from __future__ import annotations

from torch import nn

from pipeline.models.calling import ADAPTED
from pipeline.models.named_inputs import NamedInputs


def own_class(model: nn.Module) -> type[nn.Module]:
    """The class that the user wrote, where `model` was given another so that its inputs come by position."""
    kind = type(model)
    return kind.__bases__[0] if vars(kind).get(ADAPTED) else kind


def as_written(model: nn.Module) -> tuple[nn.Module, str]:
    """`at_home`, in place of the user's own class again."""
    home, within = at_home(model)
    home.__class__ = own_class(home)
    return home, within


def at_home(model: nn.Module) -> tuple[nn.Module, str]:
    """A transformers model without what hands its inputs over by name, and the name that it has in there; any other
    model itself, and "".
    """
    return (model.net, "net") if isinstance(model, NamedInputs) else (model, "")
