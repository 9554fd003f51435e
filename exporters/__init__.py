"""PyTorch and ONNX in, files out. Knows nothing of the pipeline or the validators.

from pathlib import Path
from exporters.summary import describe
from exporters.to_ort import optimize
from exporters.export import to_onnx

to_onnx(model.eval(), Path("model.onnx"), example=(image,), opset=20, metadata={"author": "me"})
optimize(Path("model.onnx"), Path("model.opt.onnx"), level="extended", threads=1)
print(describe(Path("model.opt.onnx")).operators)
"""

import os

import lazy_loader

# onnxruntime 1.31 and later log what they run, for upload. They read this when imported; child processes inherit it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
