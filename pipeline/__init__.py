"""leanort from Python: the same chain as the command line, with objects in and typed results out.

    import pipeline
    release = pipeline.deploy(model, {"train": ..., "test": ...}, pipeline.Config(name="mynet"))
    release.passed, release[pipeline.Validated].latency_ratio, release.folder

Nothing is printed unless a `progress` that prints is passed in. Names load on first use, so that importing is instant.
"""

import os

import lazy_loader

# onnxruntime 1.31 and later log what they run, for upload. They read this when imported; child processes inherit it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
