"""From measurements and a policy to a verdict. Whatever a limit asks for and was not measured fails, never passes.

A measurement's key is its metric's name, followed by " vs dense" or " vs promoted" where it is a comparison; parity has
one key per hop, "parity folded - shrunk". Keys and values are stored with a version, so that another policy can judge
it again without measuring anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.recipe.policy import Policy, Rule
from validators.gates import Limit, Measured, Operator, Verdict, judge

if TYPE_CHECKING:  # it needs torch, which judging again what is stored does not
    from pipeline.tasks.task import Task

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
SCORE = "score"
"""The key of the task's own score, whatever it is called."""
AGREEMENT, COSINE = "agreement vs dense", "output cosine vs dense"
UNLABELLED = (
    "the data has no labels: how often the shipped model answers as the dense one was judged, not how often either is "
    "right"
)
UNLIKE = "the data has no labels: how near the outputs are to the dense ones was judged, not how good either is"
NO_DATA = (
    "no data was given: judged were that the files compute the same function, their latency and their size, not how "
    "good the answers are"
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
    "score": "score",
    "top5": "top-5 accuracy",
    "agreement": "agreement",
    "output cosine": "cosine of the outputs",
}
MEASURED = frozenset(_NAMES) - {SCORE}
"""The keys of what the gate measures itself, which no metric of the user's own may be called by."""


def key_of(rule: Rule) -> str:
    """The measurement that a rule limits."""
    return f"{rule.metric} vs {rule.against}" if rule.against else rule.metric


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
    if metric == SCORE:
        return f"score lost against {other}"
    if metric in _NAMES:
        return f"{_NAMES[metric].partition(' (')[0]} (of {other})"
    return f"{metric} lost against {other}"


@dataclass(frozen=True)
class Judged:
    """What of a model's answers is judged: the task's score by name, told in points where it is a share.

    `labelled`: False where the data has no labels and the task is about answers: agreement with dense stands for it.
    """

    score: str = "accuracy"
    share: bool = True
    labelled: bool = True
    made_up: bool = False
    """There was no data: nothing of the answers is judged but parity."""
    taught: bool = False
    """The score tells how near the outputs are to the dense ones: 1 is what dense itself has."""

    @classmethod
    def of(cls, task: Task, *, labelled: bool, made_up: bool = False) -> Judged:
        """By a task's score."""
        return cls(task.score.name, task.score.share, labelled or task.taught, made_up, task.taught)


def rules(policy: Policy, judged: Judged | None = None) -> tuple[Rule, ...]:
    """Every rule of a policy but parity: those that have keys of their own, then the further ones.

    Without labels, agreement with the dense model is limited in the place of the score.
    """
    return (
        *answer_rules(policy, judged or Judged()),
        Rule(metric="latency", against="dense", max=policy.max_latency_ratio),
        Rule(metric="file_size", against="dense", max=policy.max_size_ratio),
        *policy.limits,
    )


def answer_rules(policy: Policy, judged: Judged) -> tuple[Rule, ...]:
    """The limits on what the shipped model answers: what the score lost, or without labels the agreement with dense."""
    by = policy.score_by
    if judged.made_up:
        return ()
    if judged.taught:
        return (Rule(metric=judged.score, min=policy.min_cosine, by=by),)
    if judged.labelled:
        return (Rule(metric=judged.score, against="dense", max=policy.max_score_lost, by=by),)
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
    judged: Judged | None = None,
    given: Sequence[Rule] | None = None,
    crashed: Mapping[str, str] | None = None,
) -> tuple[Verdict, tuple[str, ...]]:
    """Judge `measurements` by `policy`, or by the rules `given` in place of its own; and what was not judged, and why.

    With rules of its own, a caller also decides what evidence will do: whether the dense model only guesses is judged
    under a whole policy alone.

    `hops` are the keys of the parity comparisons that had to be made, so that one that is missing fails. Rules against
    the promoted version are left out, and said to be, where there is none (`promoted` is False). `judged`: what
    of the answers counts. `crashed` names the validators that broke off, and why: whatever the policy limits, each is a
    fail.
    """
    limits = [Limit(metric=hop, operator="<=", value=policy.parity) for hop in hops]
    metrics: dict[str, Measured | None] = {hop: measurements.get(hop) for hop in hops}
    for limit in _ALWAYS:
        if limit.metric in measurements and (given is None or limit.metric != GUESSED):
            limits.append(limit)
            metrics[limit.metric] = measurements[limit.metric]
    judged = judged or Judged()
    notes = _unsaid(judged)
    for rule in rules(policy, judged) if given is None else given:
        key = key_of(rule)
        name = name_of(key)
        if rule.against == "promoted" and not promoted:
            notes.append(f"{name}: not judged, since no version is promoted yet")
            continue
        own = rule.metric in (*_SHARES, SCORE, judged.score)
        by = rule.by or (policy.score_by if own else "interval")
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


def _unsaid(judged: Judged) -> list[str]:
    """What the verdict does not say, for want of data or labels."""
    if judged.made_up:
        return [NO_DATA]
    return [UNLIKE] if judged.taught else [] if judged.labelled else [UNLABELLED]


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
