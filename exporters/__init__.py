"""PyTorch and ONNX in, files out. Knows nothing of the pipeline or the validators.

from pathlib import Path
from exporters.summary import describe
from exporters.to_ort import optimize
from exporters.export import to_onnx

to_onnx(model.eval(), Path("model.onnx"), example=(image,), opset=20, metadata={"author": "me"})
optimize(Path("model.onnx"), Path("model.opt.onnx"), level="extended", threads=1)
print(describe(Path("model.opt.onnx")).operators)
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
