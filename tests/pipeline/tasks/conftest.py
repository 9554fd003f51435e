"""torchmetrics, which scores are held against, imports torchvision."""

from pipeline.models import torchvision_operators  # noqa: F401
