"""Limits on what was measured, and the verdict.

A metric that is missing, or not a finite number, fails, and so does a validator that broke off. A metric that comes
with an interval passes when the whole interval is within the limit, fails when all of it is outside, and is
inconclusive when the limit lies inside it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

Outcome = Literal["pass", "fail", "inconclusive"]
Operator = Literal["<=", "<", ">=", ">", "=="]

_OPERATORS: dict[Operator, Callable[[float, float], bool]] = {
    "<=": operator.le,
    "<": operator.lt,
    ">=": operator.ge,
    ">": operator.gt,
    "==": operator.eq,
}


class Measured(BaseModel):
    """A value with the interval that it lies in."""

    model_config = ConfigDict(frozen=True)

    value: float
    low: float
    high: float

    @property
    def detectable(self) -> float:
        """The smallest difference from the value that is told from none: half the width of the interval."""
        return (self.high - self.low) / 2


class Limit(BaseModel):
    """A bound on one metric. A "warn" limit is judged and shown, but does not decide the verdict."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: str
    operator: Operator
    value: float
    level: Literal["required", "warn"] = "required"


class Check(BaseModel):
    """One limit judged; `measured` is None when the metric was missing or not finite."""

    model_config = ConfigDict(frozen=True)

    limit: Limit
    measured: Measured | None
    outcome: Outcome
    reason: str


class Verdict(BaseModel):
    """ "fail" when a required limit failed or there was none; else "inconclusive" when one was; else "pass"."""

    model_config = ConfigDict(frozen=True)

    outcome: Outcome
    checks: tuple[Check, ...]
    reasons: tuple[str, ...]


def judge(
    metrics: Mapping[str, float | Measured | None],
    limits: Sequence[Limit],
    *,
    crashed: Mapping[str, str] | None = None,
) -> Verdict:
    """Judge `metrics` by `limits`. `reasons` holds one line for each required limit that did not pass.

    `crashed` names the validators that broke off, and why: each is a check of its own that failed, limited or not.
    """
    broken = [_broken(name, why) for name, why in (crashed or {}).items()]
    checks = (*broken, *(_check(metrics.get(limit.metric), limit) for limit in limits))
    required = [check for check in checks if check.limit.level == "required"]
    if not required:
        return Verdict(outcome="fail", checks=checks, reasons=("there is no required limit, so nothing was judged",))
    outcomes = {check.outcome for check in required}
    return Verdict(
        outcome="fail" if "fail" in outcomes else "inconclusive" if "inconclusive" in outcomes else "pass",
        checks=checks,
        reasons=tuple(check.reason for check in required if check.outcome != "pass"),
    )


def _broken(name: str, why: str) -> Check:
    limit = Limit(metric=f"{name} was measured (1 = yes)", operator="==", value=1)
    return Check(limit=limit, measured=None, outcome="fail", reason=f"{name} could not be measured: {why}")


def _check(metric: float | Measured | None, limit: Limit) -> Check:
    bound = f"{limit.operator} {limit.value:g}"
    if metric is None:
        return Check(limit=limit, measured=None, outcome="fail", reason=f"{limit.metric} was not measured ({bound})")
    if not isinstance(metric, Measured):
        metric = Measured(value=metric, low=metric, high=metric)
    if not all(math.isfinite(number) for number in (metric.low, metric.value, metric.high)):
        return Check(
            limit=limit, measured=None, outcome="fail", reason=f"{limit.metric} is not a finite number ({bound})"
        )
    holds = _OPERATORS[limit.operator]
    ends = {holds(number, limit.value) for number in (metric.low, metric.value, metric.high)}
    outcome: Outcome = "inconclusive" if len(ends) == 2 else "pass" if ends == {True} else "fail"
    shown = f"{limit.metric} = {metric.value:.4g}"
    if metric.low != metric.high:
        shown += f" [{metric.low:.4g}, {metric.high:.4g}]"
    words: dict[Outcome, str] = {
        "pass": f"{shown} is {bound}",
        "fail": f"{shown} is not {bound}",
        "inconclusive": f"{shown} may or may not be {bound}; a difference of {metric.detectable:.2g} can be told",
    }
    return Check(limit=limit, measured=metric, outcome=outcome, reason=words[outcome])
