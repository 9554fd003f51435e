"""Any two runnable models in, a report out. Knows nothing of the pipeline or the exporters.

from pathlib import Path
from validators.runners import OrtRunner
from validators.parity import compare
from validators.feeds import random_feeds

a, b = (OrtRunner(Path(name), threads=1) for name in ("before.onnx", "after.onnx"))
report = compare(a, b, random_feeds(a.inputs, seed=0), atol=1e-5, rtol=0)
print(report.passed, report.max_abs, report.reasons)
"""

import os

import lazy_loader

# onnxruntime 1.31 and later log what they run, for upload. They read this when imported; child processes inherit it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
