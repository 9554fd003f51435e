from .allocation import Budget as Budget
from .allocation import Removed as Removed
from .allocation import allocate as allocate
from .criteria import CRITERIA as CRITERIA
from .criteria import Criterion as Criterion
from .criteria import Evidence as Evidence
