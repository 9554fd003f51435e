from .allocation import Budget as Budget
from .allocation import Removed as Removed
from .allocation import allocate as allocate
from .importance import group_norms as group_norms
