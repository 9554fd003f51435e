"""Normalisations, as torch's own operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.onnx_reading.node import Node
from pipeline.models.onnx_reading.values import Given, Value, tensor


def batch_norm(
    node: Node, training: bool, x: Value, scale: Value, shift: Value, mean: Value, variance: Value
) -> Tensor:
    """BatchNormalization; while `training`, with the batch's own statistics, which move the stored ones."""
    if node.get("training_mode", 0) or any(node.outputs[1:]):
        node.refuse("it is exported for training")
    if node.get("spatial", 1) != 1:
        node.refuse("statistics of each element are not read")
    held = tensor(mean), tensor(variance)
    momentum = 1.0 - node.get("momentum", 0.9)
    return F.batch_norm(tensor(x), *held, tensor(scale), tensor(shift), training, momentum, node.get("epsilon", 1e-5))


def _fitted(weight: Given, shape: list[int]) -> Tensor | None:
    """A scale or shift in the shape that is normalised; ONNX broadcasts it."""
    if weight is None:
        return None
    held = tensor(weight)
    return held if list(held.shape) == shape else held.expand(shape)


def _layer_norm(node: Node, x: Value, scale: Given = None, shift: Given = None) -> Tensor:
    if any(node.outputs[1:]):
        node.refuse("its further outputs are not read")
    x = tensor(x)
    at = node.get("axis", -1)
    shape = list(x.shape[at:])
    eps = node.get("epsilon", 1e-5)
    if node.operator == "RMSNormalization":
        return F.rms_norm(x, shape, _fitted(scale, shape), eps)
    return F.layer_norm(x, shape, _fitted(scale, shape), _fitted(shift, shape), eps)


def _instance_norm(node: Node, x: Value, scale: Value, shift: Value) -> Tensor:
    return F.instance_norm(tensor(x), weight=tensor(scale), bias=tensor(shift), eps=node.get("epsilon", 1e-5))


def _group_norm(node: Node, x: Value, scale: Value, shift: Value) -> Tensor:
    x, groups = tensor(x), node.get("num_groups")
    held = [tensor(scale), tensor(shift)]
    if held[0].numel() != x.shape[1]:  # before opset 21: one number per group
        held = [one.repeat_interleave(x.shape[1] // groups) for one in held]
    return F.group_norm(x, groups, held[0], held[1], node.get("epsilon", 1e-5))


def _local_response(node: Node, x: Value) -> Tensor:
    alpha, beta, bias = node.get("alpha", 1e-4), node.get("beta", 0.75), node.get("bias", 1.0)
    return F.local_response_norm(tensor(x), node.get("size"), alpha, beta, bias)


def _lp_norm(node: Node, x: Value) -> Tensor:
    return F.normalize(tensor(x), float(node.get("p", 2)), node.get("axis", -1))


def _mean_variance(node: Node, x: Value) -> Tensor:
    x, axes = tensor(x), node.get("axes", [0, 2, 3])
    if 0 in axes:
        node.refuse("statistics over the batch make every sample depend on the others")
    centred = x - x.mean(axes, keepdim=True)
    return centred / torch.sqrt(centred.pow(2).mean(axes, keepdim=True) + 1e-9)


TABLE: Mapping[str, Callable[..., Any]] = {
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _layer_norm,
    "InstanceNormalization": _instance_norm,
    "GroupNormalization": _group_norm,
    "LRN": _local_response,
    "LpNormalization": _lp_norm,
    "MeanVarianceNormalization": _mean_variance,
}
