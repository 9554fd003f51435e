"""The structural shrinker: capture -> analyse -> masks -> shrink -> prove. Pure graph analysis, no I/O.

captured = capture(model, (example,))
analysis = analyse(captured)
removed  = {cluster.name: flags, ...}                  # True = goes
folded   = captured.fold(analysis.masks(removed))      # or weights that a fine-tuning under these masks gave
small    = shrink(folded, analysis, removed)
proof    = prove(folded, small, inputs)
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
