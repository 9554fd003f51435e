from .find import load as load
from .source import Input as Input
from .source import ModelSource as ModelSource
from .source import Pretrained as Pretrained
from .source import Shape as Shape
from .source import Size as Size
from .source import example as example
from .trial import check as check
