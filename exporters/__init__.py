"""PyTorch and ONNX in, files out. Knows nothing of the pipeline or the validators.

from pathlib import Path
from exporters import describe, optimize, to_onnx

to_onnx(model.eval(), Path("model.onnx"), example=(image,), opset=20, metadata={"author": "me"})
optimize(Path("model.onnx"), Path("model.opt.onnx"), level="extended", threads=1)
print(describe(Path("model.opt.onnx")).operators)
"""

from exporters.errors import ExportError
from exporters.host import cpu_name, isa, vector_block
from exporters.quantize import QuantizedFile, quantize
from exporters.summary import OnnxSummary, TensorSpec, describe
from exporters.to_onnx import OnnxFile, to_onnx
from exporters.to_ort import OptimizedFile, optimize

__all__ = [
    "ExportError",
    "OnnxFile",
    "OnnxSummary",
    "OptimizedFile",
    "QuantizedFile",
    "TensorSpec",
    "cpu_name",
    "describe",
    "isa",
    "optimize",
    "quantize",
    "to_onnx",
    "vector_block",
]
