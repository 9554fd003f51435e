"""Operators on each element: sums, comparisons, activations. On numbers that are known, they are done in Python."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from pipeline.models.onnx_reading.node import DTYPES, Node
from pipeline.models.onnx_reading.values import Given, Known, Value, applied, one_number, operand, rank, shape, tensor

Reading = Callable[..., Any]


def _operands(a: Value, b: Value) -> tuple[Any, Any]:
    """At most one of them as a Python number, as the operators of tensors take it."""
    if isinstance(a, Tensor):
        return a, operand(b, a.ndim)
    return operand(a, rank(b)), tensor(b)


def _both(
    on_tensors: Callable[[Any, Any], Tensor], on_numbers: Callable[[Any, Any], Any], dtype: torch.dtype | None = None
) -> Reading:
    """An operator of two values; `dtype` of the result, None for that of the operands."""

    def read(_node: Node, a: Value, b: Value) -> Value:
        if isinstance(a, Known) and isinstance(b, Known):
            return Known(applied(on_numbers, a.array, b.array), dtype or a.dtype)
        return on_tensors(*_operands(a, b))

    return read


def _logical(on_tensors: Callable[[Tensor, Tensor], Tensor], on_numbers: Callable[[Any, Any], Any]) -> Reading:
    """An operator of two booleans."""

    def read(_node: Node, a: Value, b: Value) -> Value:
        if isinstance(a, Known) and isinstance(b, Known):
            return Known(applied(on_numbers, a.array, b.array), a.dtype)
        return on_tensors(tensor(a), tensor(b))

    return read


def _one(
    on_tensor: Callable[[Tensor], Tensor],
    on_number: Callable[[Any], Any] | None = None,
    dtype: torch.dtype | None = None,
) -> Reading:
    def read(_node: Node, x: Value) -> Value:
        if isinstance(x, Known) and on_number is not None:
            return Known(applied(on_number, x.array), dtype or x.dtype)
        return on_tensor(tensor(x))

    return read


def _quotient(a: Any, b: Any) -> Any:
    """Division as ONNX has it: of integers, towards zero."""
    if isinstance(a, float | torch.SymFloat) or isinstance(b, float | torch.SymFloat):
        return a / b if b != 0 else math.copysign(math.inf, a) if a else math.nan
    below, under = (statically_known_true(one < 0) for one in (a, b))  # as minus a size is
    if below == under:
        return a // b
    return -(-a // b) if below else -(a // -b)


def _div(a: Any, b: Any) -> Tensor:
    if any(isinstance(one, Tensor) and not one.is_floating_point() for one in (a, b)):
        if not isinstance(a, Tensor):
            a = torch.full_like(b, a)
        return torch.div(a, b, rounding_mode="trunc")
    return a / b  # type: ignore[no-any-return]


def _power(node: Node, a: Value, b: Value) -> Value:
    if isinstance(a, Known) and isinstance(b, Known):
        return Known(applied(operator.pow, a.array, b.array), a.dtype)
    base, exponent = _operands(a, b)
    made: Tensor = torch.pow(base, exponent)
    return made.to(a.dtype) if made.dtype != a.dtype else made


def _mod(node: Node, a: Value, b: Value) -> Value:
    if isinstance(a, Known) and isinstance(b, Known):
        return Known(applied(math.fmod if node.get("fmod", 0) else operator.mod, a.array, b.array), a.dtype)
    x, y = tensor(a), operand(b, rank(a))
    return torch.fmod(x, y) if node.get("fmod", 0) else torch.remainder(x, y)


def _several(on_two: Callable[[Tensor, Tensor], Tensor], on_numbers: Callable[[Any, Any], Any]) -> Reading:
    """Max, Min, Sum: any number of operands."""

    def read(_node: Node, *values: Value) -> Value:
        if all(isinstance(one, Known) for one in values):
            return Known(
                reduce(lambda a, b: applied(on_numbers, a, b), [one.array for one in values]),  # type: ignore[union-attr]
                values[0].dtype,
            )
        return reduce(on_two, [tensor(one) for one in values])

    return read


def _extreme(bound: str) -> Reading:
    """Max or Min; against one number it is a clamp, which has no second operand."""
    pick = torch.maximum if bound == "min" else torch.minimum
    several = _several(pick, max if bound == "min" else min)

    def read(node: Node, *values: Value) -> Value:
        if len(values) == 2 and isinstance(values[0], Known) != isinstance(values[1], Known):
            x, limit = values if isinstance(values[0], Tensor) else values[::-1]
            number = operand(limit, rank(x))
            if not isinstance(number, Tensor):
                return torch.clamp(tensor(x), **{bound: number})
        made: Value = several(node, *values)
        return made

    return read


def _mean(node: Node, *values: Value) -> Value:
    return reduce(torch.add, [tensor(one) for one in values]) / len(values)


def _to_float(number: Any) -> Any:
    return torch.sym_float(number)  # type: ignore[no-untyped-call]


def _to_int(number: Any) -> Any:
    return torch.sym_int(number)  # type: ignore[no-untyped-call]


def _cast_number(number: Any, dtype: torch.dtype) -> Any:
    if dtype == torch.bool:
        return bool(number)
    if dtype.is_floating_point:
        if isinstance(number, torch.SymInt):
            return _to_float(number)
        return number if isinstance(number, torch.SymFloat) else float(number)
    if isinstance(number, torch.SymInt):
        return number
    return _to_int(number) if isinstance(number, torch.SymFloat) else int(number)


def _cast(node: Node, x: Value, like: Given = None) -> Value:
    if node.operator == "CastLike":
        assert like is not None
        dtype = like.dtype
    else:
        to = node.get("to")
        if to not in DTYPES:
            node.refuse("it casts to a type that is not read")
        dtype = DTYPES[to]
    if isinstance(x, Known):
        return Known(applied(lambda one: _cast_number(one, dtype), x.array), dtype)
    return x if x.dtype == dtype else x.to(dtype)


def _where(node: Node, condition: Value, a: Value, b: Value) -> Value:
    if isinstance(condition, Known) and isinstance(a, Known) and isinstance(b, Known):
        return Known(applied(lambda yes, x, y: x if yes else y, condition.array, a.array, b.array), a.dtype)
    yes = tensor(condition)
    if isinstance(a, Known) and isinstance(b, Known):
        return torch.where(yes, tensor(a), tensor(b))
    x, y = _operands(a, b)
    return torch.where(yes, x, y)


def _clip(node: Node, x: Value, low: Given = None, high: Given = None) -> Value:
    if node.opset < 11:
        bounds = (node.get("min"), node.get("max"))
    elif isinstance(low, Tensor) or isinstance(high, Tensor):  # bounds that are computed
        return torch.clamp(tensor(x), *(None if one is None else tensor(one) for one in (low, high)))
    else:
        bounds = (one_number(node, low, "lower bound"), one_number(node, high, "upper bound"))
    if isinstance(x, Known):
        least, most = (-math.inf if bounds[0] is None else bounds[0]), (math.inf if bounds[1] is None else bounds[1])
        return Known(applied(lambda one: min(max(one, least), most), x.array), x.dtype)
    if bounds == (0.0, 6.0):
        return F.relu6(x)
    if bounds == (None, None):
        return x
    return torch.clamp(x, *bounds)


def _prelu(node: Node, x: Value, slope: Value) -> Tensor:
    """Slopes are one per channel where `weights` could lay them out so, and they run along the channels of `x`."""
    x, given = tensor(x), node.get("per_channel", 0)
    if shape(slope) in ((), (1,)) or (given and given == x.ndim - 1):
        return F.prelu(x, tensor(slope).reshape(-1))
    along = tensor(slope).reshape(-1, *[1] * (given - 1)) if given else slope
    return torch.where(x >= 0, x, x * operand(along, x.ndim))


def _gelu(node: Node, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=node.get("approximate", "none"))


def _hard_sigmoid(node: Node, x: Tensor) -> Tensor:
    alpha, beta = node.get("alpha", 0.2), node.get("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return F.hardsigmoid(x)
    return torch.clamp(x * alpha + beta, 0.0, 1.0)


def _softmax(node: Node, x: Tensor) -> Tensor:
    form = F.log_softmax if node.operator == "LogSoftmax" else F.softmax
    axis = node.get("axis", -1 if node.opset >= 13 else 1)
    if node.opset >= 13 or axis in (-1, x.ndim - 1):
        return form(x, dim=axis)
    # Before opset 13 it ran over all axes from this one on, taken as one.
    return form(x.flatten(axis), dim=-1).reshape(x.shape)


def _shrink(node: Node, x: Tensor) -> Tensor:
    bias, limit = node.get("bias", 0.0), node.get("lambd", 0.5)
    zero = torch.zeros_like(x)
    return torch.where(x < -limit, x + bias, torch.where(x > limit, x - bias, zero))


def _is_inf(node: Node, x: Tensor) -> Tensor:
    low, high = node.get("detect_negative", 1), node.get("detect_positive", 1)
    if low and high:
        return torch.isinf(x)
    if not (low or high):
        return torch.zeros_like(x, dtype=torch.bool)
    return torch.isneginf(x) if low else torch.isposinf(x)


def _cumulative_sum(node: Node, x: Tensor, along: Value) -> Tensor:
    axis = int(one_number(node, along, "axis"))
    turned = torch.flip(x, [axis]) if node.get("reverse", 0) else x
    summed = torch.cumsum(turned, axis)
    if node.get("exclusive", 0):
        summed = summed - turned
    return torch.flip(summed, [axis]) if node.get("reverse", 0) else summed


def _bit_shift(node: Node, a: Value, b: Value) -> Tensor:
    form = torch.bitwise_left_shift if node.get("direction") == "LEFT" else torch.bitwise_right_shift
    return form(tensor(a), tensor(b))


def _swish(node: Node, x: Tensor) -> Tensor:
    alpha = node.get("alpha", 1.0)
    return F.silu(x) if alpha == 1.0 else x * torch.sigmoid(x * alpha)


def _settled(form: Callable[[Node, Tensor], Tensor]) -> Reading:
    """An activation with attributes: its input as a tensor."""

    def read(node: Node, x: Value) -> Tensor:
        return form(node, tensor(x))

    return read


def _rounded(form: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Floor or ceil of a number, as a float."""
    return lambda one: _to_float(form(one))


_BOOL = torch.bool

TABLE: Mapping[str, Reading] = {
    "Add": _both(operator.add, operator.add),
    "Sub": _both(operator.sub, operator.sub),
    "Mul": _both(operator.mul, operator.mul),
    "Div": _both(_div, _quotient),
    "Pow": _power,
    "Mod": _mod,
    "Max": _extreme("min"),
    "Min": _extreme("max"),
    "Sum": _several(torch.add, operator.add),
    "Mean": _mean,
    "Equal": _both(operator.eq, operator.eq, _BOOL),
    "Greater": _both(operator.gt, operator.gt, _BOOL),
    "GreaterOrEqual": _both(operator.ge, operator.ge, _BOOL),
    "Less": _both(operator.lt, operator.lt, _BOOL),
    "LessOrEqual": _both(operator.le, operator.le, _BOOL),
    "And": _logical(torch.logical_and, lambda a, b: a and b),
    "Or": _logical(torch.logical_or, lambda a, b: a or b),
    "Xor": _logical(torch.logical_xor, operator.xor),
    "BitwiseAnd": _both(operator.and_, operator.and_),
    "BitwiseOr": _both(operator.or_, operator.or_),
    "BitwiseXor": _both(operator.xor, operator.xor),
    "BitwiseNot": _one(torch.bitwise_not, operator.invert),
    "BitShift": _bit_shift,
    "Not": _one(torch.logical_not, operator.not_),
    "Neg": _one(torch.neg, operator.neg),
    "Abs": _one(torch.abs, abs),
    "Sign": _one(torch.sign),
    "Floor": _one(torch.floor, _rounded(math.floor)),
    "Ceil": _one(torch.ceil, _rounded(math.ceil)),
    "Round": _one(torch.round, _rounded(round)),
    "Sqrt": _one(torch.sqrt, lambda one: _to_float(one) ** 0.5 if one >= 0 else math.nan),
    "Exp": _one(torch.exp),
    "Log": _one(torch.log),
    "Reciprocal": _one(torch.reciprocal, lambda one: _quotient(1.0, one)),
    "Erf": _one(torch.erf),
    "Sin": _one(torch.sin),
    "Cos": _one(torch.cos),
    "Tan": _one(torch.tan),
    "Asin": _one(torch.asin),
    "Acos": _one(torch.acos),
    "Atan": _one(torch.atan),
    "Sinh": _one(torch.sinh),
    "Cosh": _one(torch.cosh),
    "Asinh": _one(torch.asinh),
    "Acosh": _one(torch.acosh),
    "Atanh": _one(torch.atanh),
    "IsNaN": _one(torch.isnan),
    "IsInf": _settled(_is_inf),
    "Relu": _one(F.relu),
    "Sigmoid": _one(torch.sigmoid),
    "Tanh": _one(torch.tanh),
    "Softplus": _one(F.softplus),
    "Softsign": _one(F.softsign),
    "HardSwish": _one(F.hardswish),
    "Mish": _one(F.mish),
    "Swish": _settled(_swish),
    "Gelu": _settled(_gelu),
    "HardSigmoid": _settled(_hard_sigmoid),
    "Elu": _settled(lambda node, x: F.elu(x, node.get("alpha", 1.0))),
    "Celu": _settled(lambda node, x: F.celu(x, node.get("alpha", 1.0))),
    "Selu": _settled(lambda node, x: _selu(node, x)),
    "LeakyRelu": _settled(lambda node, x: F.leaky_relu(x, node.get("alpha", 0.01))),
    "ThresholdedRelu": _settled(lambda node, x: F.threshold(x, node.get("alpha", 1.0), 0.0)),
    "Shrink": _settled(_shrink),
    "PRelu": _prelu,
    "Softmax": _settled(_softmax),
    "LogSoftmax": _settled(_softmax),
    "Clip": _clip,
    "Cast": _cast,
    "CastLike": _cast,
    "Where": _where,
    "CumSum": _cumulative_sum,
}  # fmt: skip


def _selu(node: Node, x: Tensor) -> Tensor:
    alpha, gamma = node.get("alpha", 1.67326319217681884765625), node.get("gamma", 1.05070102214813232421875)
    if abs(alpha - 1.6732632) < 1e-6 and abs(gamma - 1.050701) < 1e-6:
        return F.selu(x)
    made: Tensor = F.elu(x, alpha) * gamma
    return made
