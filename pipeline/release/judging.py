"""The verdict on a stored version, from what was measured when it was made: stored verdicts are not believed."""

from __future__ import annotations

from pathlib import Path

from foundation.errors import ConfigError, StoreError, first_line
from pipeline.artifacts.eager import Finetuned
from pipeline.artifacts.verdict import Validated
from pipeline.gate import policy
from pipeline.recipe import config
from pipeline.recipe.policy import Policy
from pipeline.release import records
from validators.gates import Verdict


def judge(checked: Validated, limits: Policy) -> tuple[Verdict, tuple[str, ...]]:
    """The verdict by `limits` on a version's stored measurements, and what was not judged, and why."""
    return policy.decide(
        limits,
        checked.measurements,
        hops=[f"{policy.PARITY}{hop.reference} - {hop.candidate}" for hop in checked.hops if hop.judged],
        promoted=bool(checked.promoted),
        judged=_judged(checked),
        crashed=checked.crashed,
    )


def untrained(checked: Validated, finetuned: Finetuned) -> str | None:
    """Why nothing was trained, where it is for the model's answers, alone or among others, that a version did not pass;
    None where that is not so.
    """
    names = tuple(policy.name_of(policy.key_of(rule)) for rule in policy.answer_rules(Policy(), _judged(checked)))
    if not any(one.limit.metric.startswith(names) for one in checked.verdict.checks if one.outcome != "pass"):
        return None
    return next((rung.why for rung in finetuned.rungs if rung.name == "training" and rung.score is None), None)


def _judged(checked: Validated) -> policy.Judged:
    """What of the answers counts, as the version was measured; before there were tasks it was accuracy."""
    score = checked.judged_score
    if score is None:
        return policy.Judged(labelled=checked.labelled)
    return policy.Judged(score.name, score.share, labelled=True, taught=not checked.labelled, made_up=checked.made_up)


def measured(version: Path) -> tuple[Validated, Policy]:
    """What was measured on a version, and its own recipe's limits. Raises StoreError when either cannot be read."""
    try:
        return Validated.load(version / Validated.STAGE), config.load(version / records.RECIPE).gate
    except (OSError, ValueError, ConfigError) as error:
        raise StoreError(f"The verdict of {version} cannot be read: {first_line(error)}.", "Deploy again.") from None


def outcome(version: Path) -> str:
    """The outcome by the version's own recipe, judged again; the stored one where that is worse."""
    checked, limits = measured(version)
    found = judge(checked, limits)[0].outcome
    return found if checked.verdict.outcome == "pass" else checked.verdict.outcome
