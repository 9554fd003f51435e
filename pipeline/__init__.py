"""leanort from Python: the same chain as the command line, with objects in and typed results out.

    import pipeline
    release = pipeline.deploy(model, {"train": ..., "test": ...}, pipeline.Config(name="mynet"))
    release.passed, release[pipeline.Validated].latency_ratio, release.folder

Nothing is printed unless a `progress` that prints is passed in. Names load on first use, so that importing is instant.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
