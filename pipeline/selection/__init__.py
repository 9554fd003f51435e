"""Which channels go: what a group is worth (criteria), how many go (allocation), when (schedules)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
