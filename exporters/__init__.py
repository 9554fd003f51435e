"""PyTorch and ONNX in, files out. Knows nothing of the pipeline or the validators.

from pathlib import Path
from exporters import describe, optimize, to_onnx

to_onnx(model.eval(), Path("model.onnx"), example=(image,), opset=20, metadata={"author": "me"})
optimize(Path("model.onnx"), Path("model.opt.onnx"), level="extended", threads=1)
print(describe(Path("model.opt.onnx")).operators)
"""

from exporters.bundle import Bundle, bundle
from exporters.errors import ExportError
from exporters.host import cpu_name, isa, vector_block
from exporters.quantize import QuantizedFile, quantize
from exporters.summary import OnnxSummary, TensorSpec, describe
from exporters.to_onnx import OnnxFile, to_onnx
from exporters.to_ort import OptimizedFile, OrtFormatFile, optimize, to_ort_format

__all__ = [
    "Bundle",
    "ExportError",
    "OnnxFile",
    "OnnxSummary",
    "OptimizedFile",
    "OrtFormatFile",
    "QuantizedFile",
    "TensorSpec",
    "bundle",
    "cpu_name",
    "describe",
    "isa",
    "optimize",
    "quantize",
    "to_onnx",
    "to_ort_format",
    "vector_block",
]
