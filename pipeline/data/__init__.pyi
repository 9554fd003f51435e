from .find import load as load
from .parts import PARTS as PARTS
from .parts import Augmentation as Augmentation
from .parts import Data as Data
from .parts import Part as Part
from .parts import Split as Split
