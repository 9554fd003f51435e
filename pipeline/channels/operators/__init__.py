"""What every operator relates, by family. Importing this package fills the table."""

from pipeline.channels.operators import attention, contract, create, layout, norm, pointwise, recurrent, space
from pipeline.channels.operators.table import RULES, Rule, base_name, bind, find, rule

__all__ = [
    "RULES",
    "Rule",
    "attention",
    "base_name",
    "bind",
    "contract",
    "create",
    "find",
    "layout",
    "norm",
    "pointwise",
    "recurrent",
    "rule",
    "space",
]
