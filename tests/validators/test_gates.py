import math

import pydantic
import pytest

from validators import Limit, Measured, Verdict, judge


def outcome(metric, operator, value):
    return judge({"m": metric}, [Limit(metric="m", operator=operator, value=value)]).outcome


@pytest.mark.parametrize(
    ("value", "operator", "limit", "wanted"),
    [
        (1, "<=", 1, "pass"),
        (1, "<", 1, "fail"),
        (1, ">=", 1, "pass"),
        (1, ">", 1, "fail"),
        (1, "==", 1, "pass"),
        (True, "==", 1, "pass"),
        (1.5, "<=", 1, "fail"),
        (0.5, ">=", 1, "fail"),
    ],
)
def test_a_number_is_within_its_limit_or_not(value, operator, limit, wanted):
    assert outcome(value, operator, limit) == wanted


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0.1, 0.29, "pass"),
        (0.1, 0.30, "pass"),
        (0.1, 0.31, "inconclusive"),
        (0.29, 0.9, "inconclusive"),
        (0.31, 0.9, "fail"),
    ],
)
def test_the_whole_interval_must_be_within_the_limit(low, high, wanted):
    assert outcome(Measured(value=(low + high) / 2, low=low, high=high), "<=", 0.30) == wanted


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf, Measured(value=0, low=-math.inf, high=0)])
@pytest.mark.parametrize("operator", ["<=", ">=", "<", ">"])
def test_what_was_not_measured_fails(value, operator):
    assert outcome(value, operator, 1) == "fail"


def test_a_missing_metric_fails_and_is_named():
    verdict = judge({"other": 1}, [Limit(metric="ratio", operator="<=", value=0.3)])
    assert verdict.outcome == "fail"
    assert verdict.reasons == ("ratio was not measured (<= 0.3)",)
    assert verdict.checks[0].measured is None


def test_a_validator_that_broke_off_fails_whatever_is_limited():
    verdict = judge({"m": 1}, [Limit(metric="m", operator="<=", value=2)], crashed={"latency": "RuntimeError: boom"})
    assert verdict.outcome == "fail"
    assert verdict.reasons == ("latency could not be measured: RuntimeError: boom",)
    assert judge({}, [], crashed={"latency": "boom"}).reasons == ("latency could not be measured: boom",)


def test_no_required_limit_is_a_failure():
    assert judge({"m": 1}, []).outcome == "fail"
    assert judge({"m": 1}, [Limit(metric="m", operator="<=", value=2, level="warn")]).outcome == "fail"


def test_a_warning_is_shown_but_does_not_decide():
    limits = [
        Limit(metric="a", operator="<=", value=1),
        Limit(metric="b", operator="<=", value=1, level="warn"),
    ]
    verdict = judge({"a": 1, "b": 5}, limits)
    assert verdict.outcome == "pass"
    assert [check.outcome for check in verdict.checks] == ["pass", "fail"]
    assert verdict.reasons == ()


def test_a_failure_outweighs_an_inconclusive_check_which_outweighs_a_pass():
    limits = [Limit(metric=name, operator="<=", value=1) for name in ("good", "unsure", "bad")]
    metrics = {"good": 0, "unsure": Measured(value=1, low=0, high=2), "bad": 3}
    assert judge(metrics, limits).outcome == "fail"
    verdict = judge(metrics, limits[:2])
    assert verdict.outcome == "inconclusive"
    assert verdict.reasons == ("unsure = 1 [0, 2] may or may not be <= 1; a difference of 1 can be told",)


def test_a_limit_with_an_unknown_key_or_operator_is_refused():
    for wrong in ({"operator": "~"}, {"metrik": 1}, {"level": "maybe"}):
        with pytest.raises(pydantic.ValidationError):
            Limit(**{"metric": "m", "operator": "<=", "value": 1, **wrong})


def test_a_verdict_with_a_nan_goes_to_json_and_back():
    verdict = judge({"m": math.nan}, [Limit(metric="m", operator="<=", value=1)])
    assert Verdict.model_validate_json(verdict.model_dump_json()) == verdict
