"""Data sets: where samples come from, and their train, calibration and test parts."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
