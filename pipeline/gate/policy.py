"""From measurements and a policy to a verdict. Whatever a limit asks for and was not measured fails, never passes.

A measurement's key is its metric's name, followed by " vs dense" or " vs promoted" where it is a comparison; parity has
one key per hop, "parity folded - shrunk". Keys and values are stored with a version, so that another policy can judge
it again without measuring anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pipeline.recipe.policy import Policy, Rule
from validators.gates import Limit, Measured, Operator, Verdict, judge

Measurements = Mapping[str, Measured | None]
PARITY = "parity "
# What no policy can waive, where it was measured: a file that nothing proved, precision that cost too much accuracy.
PROVEN = "proof in the race (1 = yes)"
BEYOND_BUDGET = "accuracy lost to reduced precision, beyond its budget (points)"
# A dense model that only guesses proves nothing about what was made of it, however alike the two score.
GUESSED = "chance that the dense model only guesses"
_ALWAYS = (
    Limit(metric=PROVEN, operator="==", value=1),
    Limit(metric=BEYOND_BUDGET, operator="<=", value=0),
    Limit(metric=GUESSED, operator="<=", value=0.01),
)
AGREEMENT, COSINE = "agreement vs dense", "output cosine vs dense"
UNLABELLED = (
    "the data has no labels: how often the shipped model answers as the dense one was judged, not how often either is "
    "right"
)
# Higher is better: against another model it is what was lost that counts, not a ratio.
_SHARES = {"accuracy": "accuracy drop (points)", "top5": "top-5 accuracy drop (points)"}
_NAMES = {
    "latency": "latency (ms)",
    "latency_p99": "p99 latency (ms)",
    "file_size": "file size (bytes)",
    "session_load": "session load (ms)",
    "peak_memory": "peak memory (bytes)",
    "cold_first_inference": "cold first inference (ms)",
    "macs": "MACs",
    "parameters": "parameters",
    "accuracy": "accuracy",
    "top5": "top-5 accuracy",
    "agreement": "agreement",
    "output cosine": "cosine of the outputs",
}
MEASURED = frozenset(_NAMES)
"""The keys of what the gate measures itself, which no metric of the user's own may be called by."""


def name_of(key: str) -> str:
    """How people read a measurement's key: `latency vs dense` is "latency (of dense)"."""
    metric, _, other = key.partition(" vs ")
    if not other:
        return _NAMES.get(metric, metric)
    if key in (AGREEMENT, COSINE):
        return f"{_NAMES[metric]} with dense"
    if metric in _SHARES:
        lost = _SHARES[metric]
        return lost if other == "dense" else lost.replace("drop", f"drop against {other}")
    if metric in _NAMES:
        return f"{_NAMES[metric].partition(' (')[0]} (of {other})"
    return f"{metric} lost against {other}"


def rules(policy: Policy, *, labelled: bool = True) -> tuple[Rule, ...]:
    """Every rule of a policy but parity: those that have keys of their own, then the further ones.

    Without labels, agreement with the dense model is limited in the place of accuracy.
    """
    return (
        *answer_rules(policy, labelled=labelled),
        Rule(metric="latency", against="dense", max=policy.max_latency_ratio),
        Rule(metric="file_size", against="dense", max=policy.max_size_ratio),
        *policy.limits,
    )


def answer_rules(policy: Policy, *, labelled: bool) -> tuple[Rule, ...]:
    """The limits on what the shipped model answers: the accuracy lost, or without labels the agreement with dense."""
    by = policy.accuracy_by
    if labelled:
        return (Rule(metric="accuracy", against="dense", max=policy.max_accuracy_drop_points, by=by),)
    return (
        Rule(metric="agreement", against="dense", min=policy.min_agreement, by=by),
        Rule(metric="output cosine", against="dense", min=policy.min_cosine, by=by),
    )


def decide(
    policy: Policy,
    measurements: Measurements,
    *,
    hops: Sequence[str],
    promoted: bool,
    labelled: bool = True,
    given: Sequence[Rule] | None = None,
    crashed: Mapping[str, str] | None = None,
) -> tuple[Verdict, tuple[str, ...]]:
    """Judge `measurements` by `policy`, or by the rules `given` in place of its own; and what was not judged, and why.

    With rules of its own, a caller also decides what evidence will do: whether the dense model only guesses is judged
    under a whole policy alone.

    `hops` are the keys of the parity comparisons that had to be made, so that one that is missing fails. Rules against
    the promoted version are left out, and said to be, where there is none (`promoted` is False). `labelled`: whether
    the data had labels. `crashed` names the validators that broke off, and why: whatever the policy limits, each is a
    fail.
    """
    limits = [Limit(metric=hop, operator="<=", value=policy.parity) for hop in hops]
    metrics: dict[str, Measured | None] = {hop: measurements.get(hop) for hop in hops}
    for limit in _ALWAYS:
        if limit.metric in measurements and (given is None or limit.metric != GUESSED):
            limits.append(limit)
            metrics[limit.metric] = measurements[limit.metric]
    notes: list[str] = [] if labelled else [UNLABELLED]
    for rule in rules(policy, labelled=labelled) if given is None else given:
        key = f"{rule.metric} vs {rule.against}" if rule.against else rule.metric
        name = name_of(key)
        if rule.against == "promoted" and not promoted:
            notes.append(f"{name}: not judged, since no version is promoted yet")
            continue
        by = rule.by or (policy.accuracy_by if rule.metric in _SHARES else "interval")
        found = measurements.get(key)
        if found is not None and by == "value":
            found = exactly(found.value)
        label = name if metrics.get(name, found) == found else f"{name}, by its {by}"
        metrics[label] = found
        for operator, value in _sides(rule):
            if value is not None and math.isinf(value):
                notes.append(f"{name}: the policy sets no limit ({operator} {value:g})")
            elif value is not None:
                limits.append(Limit(metric=label, operator=operator, value=value, level=rule.level))
    return judge(metrics, limits, crashed=crashed), tuple(notes)


def _sides(rule: Rule) -> tuple[tuple[Operator, float | None], ...]:
    return ("<=", rule.max), (">=", rule.min)


def exactly(value: float | None) -> Measured | None:
    """A number that was counted, not sampled; None where there is none, or it is not finite."""
    return None if value is None else finite(Measured(value=value, low=value, high=value))


def finite(measured: Measured | None) -> Measured | None:
    """`measured`, or None where any of its numbers is not finite, which JSON could not hold."""
    if measured is None or not all(map(math.isfinite, (measured.value, measured.low, measured.high))):
        return None
    return measured
