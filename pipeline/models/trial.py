"""One forward pass before anything is spent: does the model take these inputs, and give what the data needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from foundation.errors import ModelError, first_line
from pipeline.models.calling import refuse_lists_of_results

_NESTED = 100
"""Lists within lists that an output is looked for in; more is one that holds itself."""


class UnsuitedError(ModelError):
    """The model fails on such inputs; another view of the data may do."""


def run(model: nn.Module, inputs: tuple[Tensor, ...], name: str, hint: str = "") -> Any:
    """What `model`, in eval mode, returns for `inputs`.

    Raises UnsuitedError, naming the shapes and what to do (`hint`), where it fails.
    """
    shapes = ", ".join("x".join(map(str, tensor.shape)) for tensor in inputs)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            out = model(*inputs)
    except KeyboardInterrupt:
        raise
    except ModelError:
        raise
    except BaseException as error:  # a forward pass that calls sys.exit, too
        reason = first_line(error)
        raise UnsuitedError(
            f"{name} does not take input of shape {shapes}: {reason[:200]}",
            hint or "Set data.input_size to one that it takes.",
        ) from error
    finally:
        model.train(was_training)
    return out


def check(model: nn.Module, inputs: tuple[Tensor, ...], classes: int | None = None, name: str = "The model") -> Tensor:
    """Run `model` once and return its first output; `classes` is how many the data has.

    Raises ModelError, naming the shape, if the model does not take these inputs, gives no tensor, or has fewer outputs
    than the data has classes.
    """
    out = run(model, inputs, name)
    refuse_lists_of_results(out, name)
    for _ in range(_NESTED):
        if isinstance(out, Tensor):
            break
        if not isinstance(out, dict | tuple | list) or not out:
            raise ModelError(f"{name} returns {type(out).__name__}, not a tensor.", "Return logits (batch, classes).")
        out = next(iter(out.values())) if isinstance(out, dict) else out[0]
    if not isinstance(out, Tensor):
        raise ModelError(f"{name} returns lists within lists, not a tensor.", "Return logits (batch, classes).")
    if classes is not None:
        check_logits(out, len(inputs[0]) if inputs else 0, classes, name)
    return out


def check_logits(out: Tensor, rows: int, classes: int, name: str, hint: str = "") -> None:
    """Raise ModelError where `out`, of a batch of `rows` samples, can be no logits of `classes` classes.

    `hint`: what to do about a shape that does not fit, where more is known than that.
    """
    odd = "meta" if out.is_meta else "sparse" if out.layout != torch.strided else ""
    if odd or not out.is_floating_point():
        raise ModelError(
            f"{name} returns a {odd or str(out.dtype).removeprefix('torch.')} tensor, which no loss can train.",
            "Return logits (batch, classes) in a float type.",
        )
    if out.ndim == 2 and out.shape[0] != rows:
        raise ModelError(
            f"{name} gives {out.shape[0]} rows of outputs for a batch of {rows} samples.",
            "Return one row of logits per sample.",
        )
    if out.ndim != 2 or out.shape[1] < classes:
        raise ModelError(
            f"{name} gives outputs of shape {'x'.join(map(str, out.shape))} but the data has {classes} classes.",
            hint or f"Use a model with {classes} outputs, or data whose labels fit it.",
        )
