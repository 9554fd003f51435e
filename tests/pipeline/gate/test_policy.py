"""Policies: what they can limit, against what, and that nothing passes which was not measured."""

from pathlib import Path

import pytest

from foundation.errors import ConfigError
from pipeline.gate import policy
from pipeline.gate.measuring import bounds
from pipeline.recipe import config
from pipeline.recipe.policy import Policy, Rule
from validators import Measured

HOP = "parity folded - shrunk"


def measured(value: float, width: float = 0.0) -> Measured:
    return Measured(value=value, low=value - width, high=value + width)


GOOD = {
    HOP: measured(1e-7),
    "accuracy": measured(0.97),
    "accuracy vs dense": measured(0.5, 1.0),
    "latency": measured(1.7),
    "latency vs dense": measured(0.3, 0.01),
    "latency vs promoted": measured(1.04, 0.005),
    "file_size vs dense": measured(0.25),
}


def decide(found=GOOD, promoted=True, hops=(HOP,), **keys):
    return policy.decide(Policy(**keys), found, hops=hops, promoted=promoted)


def outcome(**keys):
    return decide(**keys)[0].outcome


def test_the_default_policy_judges_parity_accuracy_latency_and_size():
    verdict, notes = decide()
    assert verdict.outcome == "pass"
    assert [c.limit.metric for c in verdict.checks] == [
        HOP,
        "accuracy drop (points)",
        "latency (of dense)",
        "file size (of dense)",
    ]
    assert notes == ()


@pytest.mark.parametrize("key", [HOP, "accuracy vs dense", "latency vs dense", "file_size vs dense"])
@pytest.mark.parametrize("value", [None, measured(float("nan"))])
def test_whatever_is_missing_or_nan_fails_and_is_named(key, value):
    verdict, _ = decide({**GOOD, key: value})
    assert verdict.outcome == "fail"
    assert verdict.reasons[0].startswith(policy.name_of(key))
    assert decide({k: v for k, v in GOOD.items() if k != key})[0].outcome == "fail"


def test_nothing_measured_fails():
    assert outcome(found={}, hops=()) == "fail"


def test_accuracy_is_judged_by_its_value_or_by_its_whole_interval():
    assert outcome(accuracy_by="value") == "pass"
    assert outcome(accuracy_by="interval") == "inconclusive"
    assert outcome(score_by="interval", max_score_lost=1.5) == "pass"


def test_limits_as_they_are_against_dense_and_against_the_promoted_version():
    assert outcome(limits=[Rule(metric="latency", max=2.0)]) == "pass"
    assert outcome(limits=[Rule(metric="latency", max=1.0)]) == "fail"
    assert outcome(limits=[Rule(metric="accuracy", min=0.98)]) == "fail"
    assert outcome(limits=[Rule(metric="latency", against="promoted", max=1.02)]) == "fail"
    assert outcome(limits=[Rule(metric="latency", against="promoted", max=1.02, level="warn")]) == "pass"
    assert outcome(limits=[Rule(metric="latency", against="promoted", max=1.04)]) == "inconclusive"
    assert outcome(limits=[Rule(metric="latency", against="promoted", max=1.04, by="value")]) == "pass"
    assert outcome(limits=[Rule(metric="latenzy", max=1.0)]) == "fail"


def test_a_limit_against_the_promoted_version_waits_until_there_is_one_and_says_so():
    rule = Rule(metric="latency", against="promoted", max=1.02)
    verdict, notes = decide(limits=[rule], promoted=False)
    assert verdict.outcome == "pass"
    assert notes == ("latency (of promoted): not judged, since no version is promoted yet",)
    found = {key: value for key, value in GOOD.items() if key != "latency vs promoted"}
    assert outcome(found=found, limits=[rule]) == "fail"


def test_two_limits_on_one_metric_by_value_and_by_interval_are_two_checks():
    rule = Rule(metric="accuracy", against="dense", max=1.0, by="interval", level="warn")
    verdict, _ = decide(limits=[rule])
    assert [c.outcome for c in verdict.checks if "accuracy" in c.limit.metric] == ["pass", "inconclusive"]


def test_an_infinite_limit_is_none_and_is_said_to_be():
    verdict, notes = decide({**GOOD, "file_size vs dense": None}, max_size_ratio=float("inf"))
    assert verdict.outcome == "pass"
    assert notes == ("file size (of dense): the policy sets no limit (<= inf)",)


def test_the_race_is_asked_what_the_policy_limits():
    made = Policy(
        max_latency_ratio=0.5,
        limits=[
            Rule(metric="latency_p99", against="promoted", max=1.1),
            Rule(metric="latency", against="promoted", max=float("inf")),
            Rule(metric="peak_memory", against="dense", max=1),
        ],
    )
    asked = [(b.reference, b.value, b.of) for b in bounds(made, promoted=True)]
    assert asked == [("dense", 0.5, "median"), ("promoted", 1.1, "p99")]
    assert [b.reference for b in bounds(made, promoted=False)] == ["dense"]


def test_a_policy_file_is_read_and_its_faults_are_one_line(tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text('parity = 1e-4\n[[limits]]\nmetric = "latency_p99"\nagainst = "promoted"\nmax = 1.1\n')
    made = config.load_policy(path)
    assert (made.parity, made.limits[0].metric, made.max_size_ratio) == (1e-4, "latency_p99", 1.0)
    for text, said in (
        ("paritty = 1", "parity"),
        ("threads = 2", "in the policy"),
        ('[[limits]]\nmetrik = "a"\nmax = 1', "metric"),
        ('[[limits]]\nmetric = "a"', "neither max nor min"),
        ('[[limits]]\nmetric = "a"\nmax = nan', "not a number"),
        ("max_accuracy_drop_points = nan", "not a number"),
        ("parity = ", "TOML"),
        ("parity = true", "parity: must not be true or false"),
        ("max_latency_ratio = true", "max_latency_ratio: must not be true or false"),
        ('[[limits]]\nmetric = "a"\nmax = false', "max: must not be true or false"),
        ("x" * 100_000 + " = 1", "Unknown key"),
        ("a." * 4000 + "b = 1", "Unknown key"),
        ("parity = '" + "x" * 100_000 + "'", "parity"),
        ("accuracy_by = '" + "x" * 100_000 + "'", "accuracy_by"),
        ('[[limits]]\nmetric = "' + "x" * 100_000 + '"', "neither max nor min"),
        ("x=" + "[" * 5000, "cannot be read"),
        ("max_size_ratio = " + "9" * 5000, "cannot be read"),
        ("# " + "x" * (1 << 20), "1048576 bytes"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=said) as refused:
            config.load_policy(path)
        assert "\n" not in str(refused.value)
        assert len(str(refused.value)) < 1000
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load_policy(Path("/dev/zero"))  # it has no end
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load_policy(tmp_path / "none.toml")


def test_a_recipe_with_limits_goes_to_toml_and_back(tmp_path):
    rule = Rule(metric="latency", against="promoted", max=1.02)
    made = config.load(None, {"model": "m", "gate.limits": [rule.model_dump(exclude_none=True)]})
    (tmp_path / "r.toml").write_text(config.to_toml(made))
    assert config.load(tmp_path / "r.toml") == made
    assert config.with_policy(made, Policy()).gate.limits == ()


def test_a_policy_leaves_the_warning_of_a_latency_target(tmp_path):
    aimed = config.load(None, {"model": "m", "prune.target.latency": "0.4"})
    judged = config.with_policy(aimed, Policy(max_size_ratio=0.5))
    assert judged.gate.max_size_ratio == 0.5
    assert judged.gate.limits == aimed.gate.limits != ()
    (tmp_path / "r.toml").write_text(config.to_toml(judged))
    assert config.load(tmp_path / "r.toml") == judged
