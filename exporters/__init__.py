"""PyTorch and ONNX in, files out. Knows nothing of the pipeline or the validators.

from pathlib import Path
from exporters import describe, optimize, to_onnx

to_onnx(model.eval(), Path("model.onnx"), example=(image,), opset=20, metadata={"author": "me"})
optimize(Path("model.onnx"), Path("model.opt.onnx"), level="extended", threads=1)
print(describe(Path("model.opt.onnx")).operators)
"""

from exporters.bundle import Bundle, InputNote, Variant, bundle, check, pack, unpack
from exporters.candidates import CANDIDATES, Made, NotApplicable, Source, make
from exporters.denormals import Denormals, count_denormals, flush_denormals
from exporters.errors import ExportError
from exporters.fusions import FusedFile, expected_attention, fuse, fused_attention
from exporters.guilty import guilty_optimizers
from exporters.host import cpu_name, isa, vector_block
from exporters.quantize import QuantizedFile, quantize, quantize_dynamic, sensitivity
from exporters.summary import OnnxSummary, TensorSpec, describe
from exporters.to_onnx import OnnxFile, to_onnx
from exporters.to_ort import (
    OptimizedFile,
    OrtFormatFile,
    optimize,
    required_operators,
    session_config,
    session_of,
    to_ort_format,
)

__all__ = [
    "CANDIDATES",
    "Bundle",
    "Denormals",
    "ExportError",
    "FusedFile",
    "InputNote",
    "Made",
    "NotApplicable",
    "OnnxFile",
    "OnnxSummary",
    "OptimizedFile",
    "OrtFormatFile",
    "QuantizedFile",
    "Source",
    "TensorSpec",
    "Variant",
    "bundle",
    "check",
    "count_denormals",
    "cpu_name",
    "describe",
    "expected_attention",
    "flush_denormals",
    "fuse",
    "fused_attention",
    "guilty_optimizers",
    "isa",
    "make",
    "optimize",
    "pack",
    "quantize",
    "quantize_dynamic",
    "required_operators",
    "sensitivity",
    "session_config",
    "session_of",
    "to_onnx",
    "to_ort_format",
    "unpack",
    "vector_block",
]
