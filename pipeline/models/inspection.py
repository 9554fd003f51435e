"""What can be read off a module or a callable: its structure, its own code, the arguments that it takes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from foundation.errors import ModelError
from pipeline.channels.program.capture import unsupported

LIBRARIES = ("torch", "torchvision", "timm", "transformers")
"""Code whose version pins its behaviour; any other class of a model is fingerprinted by its source text."""


def structure(model: nn.Module) -> str:
    """Modules, their printed settings, and every parameter's and buffer's name, shape and dtype, as text."""
    printed = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(model))  # a lambda's address changes from run to run
    tensors = [
        f"{name} {tuple(t.shape)} {t.dtype}" if isinstance(t, Tensor) else f"{name} {t}"
        for name, t in model.state_dict().items()
    ]
    return "\n".join([printed, *tensors])


def check_whole(model: nn.Module, name: str) -> None:
    """Raise ModelError where a module never ran `super().__init__()`, or a weight cannot be read as real numbers."""
    seen: set[int] = set()
    waiting = [("the model", model)]
    while waiting:
        place, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if isinstance(module, torch.jit.ScriptModule):  # keeps its parts elsewhere, and has its own refusal
            return
        if "_modules" not in vars(module):
            raise ModelError(
                f"{name}: {place}, a {type(module).__name__}, never called super().__init__().",
                "Call it first in its __init__.",
            )
        waiting += [(child, part) for child, part in vars(module)["_modules"].items() if part is not None]
    if unsupported(model) is not None:  # a quantised one, whose state holds more than tensors: it has its own refusal
        return
    for place, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise ModelError(
                f"{name}: {place} in its state_dict is a {type(value).__name__}, not a tensor.",
                "Keep what is no tensor out of the module's state.",
            )
        odd = "complex" if value.is_complex() else "meta" if value.is_meta else ""
        odd = odd or ("sparse" if value.layout != torch.strided else "")
        if odd:
            raise ModelError(f"{name}: {place} is a {odd} tensor.", "Give weights that are plain real numbers.")


def own_code(model: nn.Module) -> str:
    """Source text of every class in the model that comes from none of `LIBRARIES`, or its bytecode if there is none."""
    classes = {base for module in model.modules() for base in type(module).__mro__ if issubclass(base, nn.Module)}
    own = [cls for cls in classes if cls.__module__.partition(".")[0] not in LIBRARIES]
    return "\n".join(source_text(cls) for cls in sorted(own, key=lambda cls: cls.__qualname__))


def source_text(code: Callable[..., object]) -> str:
    """Text of a class or function; without a file (a notebook long gone), its bytecode."""
    try:
        return inspect.getsource(code)
    except (OSError, TypeError):
        function = getattr(code, "forward", code)
        compiled = getattr(function, "__code__", None)
        return f"{code!r}" if compiled is None else f"{compiled.co_code.hex()} {compiled.co_names}"


def tensor_bytes(tensor: Tensor) -> bytes:
    """Raw bytes of a tensor of any dtype, in row-major order."""
    plain = tensor.detach().cpu().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def accepted(call: Callable[..., object], **offered: object) -> dict[str, object]:
    """The part of `offered` that `call` takes by name, values of None left out."""
    try:
        parameters = inspect.signature(call).parameters.values()
    except (ValueError, TypeError):  # some built-ins show no signature
        return {}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return {k: v for k, v in offered.items() if v is not None and (takes_any or k in names)}


def required(call: Callable[..., object]) -> list[str]:
    """Names of the arguments that `call` cannot do without."""
    try:
        parameters = inspect.signature(call).parameters.values()
    except (ValueError, TypeError):
        return []
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in parameters if p.kind in kinds and p.default is p.empty]
