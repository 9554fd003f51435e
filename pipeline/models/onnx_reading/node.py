"""One node of an ONNX graph as Python values, and what every reading of an operator asks of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

DTYPES: Mapping[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.INT8: torch.int8,
    TensorProto.INT16: torch.int16,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    TensorProto.UINT8: torch.uint8,
    TensorProto.UINT16: torch.uint16,
    TensorProto.UINT32: torch.uint32,
    TensorProto.UINT64: torch.uint64,
    TensorProto.BOOL: torch.bool,
}
"""ONNX element types that torch has."""


class NotReadError(Exception):
    """A node, or a file, that cannot be read as torch operators; the message is a clause without a full stop."""


@dataclass(frozen=True)
class Node:
    """A node: `operator` of the default domain at version `opset`, names of its inputs ("" = left out) and outputs.

    Operators in lower case are this package's own: what is left of ONNX's once their weights are laid out as torch's
    (`weights`), or several nodes joined to one (`patterns`).
    """

    operator: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    opset: int

    def get(self, attribute: str, default: Any = None) -> Any:
        """An attribute as a Python value, or `default`."""
        return self.attributes.get(attribute, default)

    def having(self, operator: str, inputs: Sequence[str], **attributes: Any) -> Node:
        """Another operator in this one's place, with the same outputs."""
        return replace(self, operator=operator, inputs=tuple(inputs), attributes=attributes)

    def refuse(self, reason: str) -> NoReturn:
        """Raise NotReadError: this node cannot be read because of `reason`."""
        raise NotReadError(f"{self}: {reason}")

    def __str__(self) -> str:
        return f"{self.operator} (node {self.name})" if self.name else f"{self.operator} (node of {self.outputs[0]})"


def read_node(proto: onnx.NodeProto, opset: int) -> Node:
    """`proto` with its attributes as Python values, tensors among them as torch's. Raises NotReadError."""
    node = Node(proto.op_type, proto.name, tuple(proto.input), tuple(proto.output), {}, opset)
    return replace(node, attributes={one.name: _attribute(node, one) for one in proto.attribute})


def _attribute(node: Node, proto: onnx.AttributeProto) -> Any:
    if proto.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
        return None  # operators that hold graphs are refused by name
    value = helper.get_attribute_value(proto)
    if isinstance(value, TensorProto):
        held = read_tensor(value)
        # Read here: while a module is captured, the number in a tensor is out of reach.
        return (held.reshape(-1)[0].item(), held.dtype) if node.operator == "ConstantOfShape" else held
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if proto.type == onnx.AttributeProto.STRINGS:
        return [text.decode("utf-8", "replace") for text in value]
    if proto.type in (onnx.AttributeProto.SPARSE_TENSOR, onnx.AttributeProto.SPARSE_TENSORS):
        node.refuse("sparse tensors are not read")
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def read_tensor(proto: TensorProto) -> Tensor:
    """The tensor that `proto` holds. Raises NotReadError for types that torch lacks, and for data of another size."""
    if proto.data_type not in DTYPES:
        kind = TensorProto.DataType.Name(proto.data_type).lower()
        raise NotReadError(f"its tensor {proto.name} is of type {kind}, which is not read")
    array = np.array(numpy_helper.to_array(proto))  # a copy: what numpy_helper gives may be read-only
    if proto.data_type == TensorProto.BFLOAT16:
        return torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16)
    return torch.from_numpy(array)
