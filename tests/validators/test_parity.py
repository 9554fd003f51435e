import numpy as np
import pytest
import torch

from validators import (
    Feed,
    OrtRunner,
    ParityReport,
    TorchRunner,
    ValidationError,
    compare,
    compare_arrays,
    compare_chain,
    edge_feeds,
    parity,
    random_feeds,
)

F32 = np.float32


@pytest.fixture
def feeds():
    return [Feed(f"feed {n}", {"input": np.full((n, 3), n, F32)}) for n in (1, 2)]


def arrays(reference, candidate, atol=1e-5, rtol=0.0):
    return compare_arrays(np.asarray(reference), np.asarray(candidate), atol=atol, rtol=rtol)


def test_onnxruntime_agrees_with_torch(linear_onnx, linear_torch):
    reference = TorchRunner(linear_torch, example=(torch.zeros(1, 3),), threads=1)
    candidate = OrtRunner(linear_onnx(), threads=1)
    inputs = candidate.inputs
    report = compare(reference, candidate, random_feeds(inputs, seed=0) + edge_feeds(inputs, seed=0), atol=1e-6, rtol=0)
    assert report.passed, report.reasons
    assert len(report.outputs) == 9
    assert report.top1 == 1
    assert report.max_scaled < 1e-6
    assert ParityReport.model_validate_json(report.model_dump_json()) == report


def test_one_wrong_weight_is_found_and_the_worst_feed_named(linear_onnx, weight):
    wrong = weight.copy()
    wrong[1, 2] += 0.01
    good, bad = OrtRunner(linear_onnx(), threads=1), OrtRunner(linear_onnx("bad.onnx", wrong), threads=1)
    x = np.zeros((2, 3), F32)
    feeds = [Feed("blind", {"input": x}), Feed("small", {"input": x + 0.01}), Feed("large", {"input": x + 5})]
    report = compare(good, bad, feeds, atol=1e-5, rtol=0)
    assert not report.passed
    assert report.worst.feed == "large"
    assert report.worst.max_abs == pytest.approx(0.05, rel=1e-4)
    assert [entry.passed for entry in report.outputs] == [True, False, False]
    assert "large: output: 2 of 8 elements differ" in report.reasons[-1]


@pytest.mark.parametrize(("error", "passed"), [(0.9e-5, True), (1.1e-5, False)])
def test_below_one_atol_is_absolute(error, passed):
    assert arrays([0.25, 0.5], [0.25 + error, 0.5]).passed is passed


@pytest.mark.parametrize(("error", "passed"), [(0.9e-3, True), (1.1e-3, False)])
def test_above_one_atol_grows_with_the_largest_element(error, passed):
    result = arrays([0.0, -100.0], [error, -100.0])
    assert result.passed is passed
    assert result.tolerance == pytest.approx(1e-3)


@pytest.mark.parametrize(("error", "passed"), [(0.9, True), (1.1, False)])
def test_rtol_adds_a_share_of_each_element(error, passed):
    assert arrays([1.0, 100.0], [1.0, 100.0 + error], atol=0.0, rtol=0.01).passed is passed
    assert not arrays([1.0, 100.0], [1.0 + error, 100.0], atol=0.0, rtol=0.01).passed


def test_figures_are_what_they_say():
    result = arrays(F32([[1.0, 2.0], [4.0, 0.0]]), F32([[1.5, 2.0], [3.0, 0.0]]), atol=1.0)
    assert (result.max_abs, result.mean_abs) == (1.0, 0.375)
    assert result.max_rel == 0.5
    assert result.mean_rel == pytest.approx((0.5 + 0 + 0.25) / 3)
    assert result.scale == 4.0
    assert result.top1 == 1.0
    a, b = np.array([1, 2, 4, 0]), np.array([1.5, 2, 3, 0])
    assert result.cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_top5_asks_for_the_same_five_in_whatever_order():
    reference = np.tile(np.arange(8.0), (4, 1)).astype(np.float32)
    candidate = reference.copy()
    candidate[0, [6, 7]] = candidate[0, [7, 6]]
    candidate[1, 2] = 3.5
    result = arrays(reference, candidate, atol=9.0)
    assert (result.top1, result.top5) == (0.75, 0.75)
    assert arrays(reference[:, :5], candidate[:, :5], atol=9.0).top5 is None


def test_top1_counts_the_rows_that_agree():
    reference = F32([[1, 0], [1, 0], [0, 1], [0, 1]])
    assert arrays(reference, reference[[0, 2, 2, 3]], atol=2.0).top1 == 0.75
    assert arrays(reference.reshape(2, 2, 2), reference.reshape(2, 2, 2)).top1 is None


def test_ulps_count_the_numbers_in_between_across_zero_too():
    one = F32(1)
    tiny = np.nextafter(F32(0), one)
    result = arrays(
        F32([1, 1, -1, -tiny]), F32([np.nextafter(one, F32(2)), 1, np.nextafter(-one, F32(0)), tiny]), atol=1.0
    )
    assert (result.ulp_p50, result.ulp_max) == (1, 2)
    assert arrays(F32([0.0]), F32([-0.0])).ulp_max == 0


@pytest.mark.parametrize(
    ("reference", "candidate", "reason"),
    [
        (F32([1, 2]), F32([[1, 2]]), "shape"),
        (F32([1, 2]), np.array([1.0, 2.0]), "type float64 instead of float32"),
        (F32([1, 2]), F32([1, np.nan]), "1 NaN in the candidate"),
        (F32([1, np.nan]), F32([1, np.nan]), "1 NaN in the reference"),
        (F32([1, 2]), F32([1, np.inf]), "infinity"),
        (F32([1, np.inf]), F32([1, -np.inf]), "infinity"),
        (F32([1, np.inf]), F32([1, 2]), "infinity"),
        (F32([np.inf]), F32([np.inf]), "no finite element"),
        (F32([]), F32([]), "empty"),
        (np.array([1, 2]), np.array([1, 3]), "1 of 2 elements differ"),
        (np.array([True]), np.array([False]), "1 of 1 elements differ"),
    ],
)
def test_these_fail_whatever_the_tolerance(reference, candidate, reason):
    result = arrays(reference, candidate, atol=1e9, rtol=1e9)
    assert not result.passed
    assert reason in result.reason


def made_up(reference, candidate, origin="made"):
    return compare_arrays(reference, candidate, atol=1e-5, rtol=0.0, origin=origin)


@pytest.mark.parametrize("origin", ["made", "tried"])
def test_nan_at_the_same_places_on_made_up_inputs_is_no_difference_and_no_evidence(origin):
    some = F32([np.nan, 1, np.inf])
    found = made_up(some, some.copy(), origin)
    assert (found.passed, found.compared, found.elements) == (True, True, 1)
    assert not made_up(some, F32([np.nan, 1.1, np.inf]), origin).passed
    assert "1 NaN in the reference" in made_up(some, F32([5, 1, np.inf]), origin).reason
    assert "1 NaN in the candidate" in made_up(F32([5, 1]), F32([np.nan, 1]), origin).reason
    assert "infinity" in made_up(some, F32([np.nan, 1, 3]), origin).reason
    assert "NaN in" in made_up(F32([np.nan, np.inf]), F32([np.inf, np.nan]), origin).reason
    nothing = made_up(F32([np.nan, np.inf]), F32([np.nan, np.inf]), origin)
    assert (nothing.passed, nothing.compared, nothing.max_abs) == (True, False, None)


def test_an_output_that_is_never_finite_is_not_compared(function_runner):
    never = function_runner(lambda x: x * F32(np.nan))
    ones = {"input": np.ones((1, 3), F32)}
    report = compare(never, never, [Feed("a", ones, "made"), Feed("b", ones, "tried")], atol=1, rtol=0)
    assert (report.passed, report.judged) == (False, None)
    assert "never finite on the made-up inputs" in report.reasons[0]
    root = function_runner(np.sqrt)
    feeds = [Feed("outside", {"input": -np.ones((1, 3), F32)}, "made"), Feed("inside", ones)]
    report = compare(root, root, feeds, atol=1e-5, rtol=0)
    assert (report.passed, report.judged) == (True, 0)
    assert "1 of 2 feeds gave nothing finite" in report.notes[0]
    assert not compare(root, root, [Feed("outside", feeds[0].arrays), feeds[1]], atol=1e-5, rtol=0).passed


def test_only_where_nobody_promised_that_a_model_runs_may_both_raise(function_runner):
    def picky(x):
        if len(x) > 1:
            raise ValueError("too many")
        return np.copy(x)

    one, two = ({"input": np.ones((size, 3), F32)} for size in (1, 2))
    strict, free = function_runner(picky), function_runner(np.copy)
    tried = [Feed("one", one, "tried"), Feed("two", two, "tried")]
    report = compare(strict, strict, tried, atol=1e-5, rtol=0)
    assert report.passed
    assert "1 of 2 feeds were taken by neither model; two: " in report.notes[0]
    assert not compare(free, strict, tried, atol=1e-5, rtol=0).passed
    assert not compare(strict, free, tried, atol=1e-5, rtol=0).passed
    assert not compare(strict, strict, [tried[0], Feed("two", two, "made")], atol=1e-5, rtol=0).passed
    alone = compare(strict, strict, tried[1:], atol=1e-5, rtol=0)
    assert not alone.passed
    assert "nothing was compared" in alone.reasons[0]


def test_the_same_infinity_in_both_is_equal():
    assert arrays(F32([1, -np.inf]), F32([1, -np.inf])).passed


def test_nothing_compared_is_a_failure(function_runner):
    report = compare(function_runner(np.copy), function_runner(np.copy), [], atol=1, rtol=0)
    assert (report.passed, report.reasons, report.max_abs) == (False, ("nothing was compared",), None)
    nothing = function_runner(lambda x: {})
    assert not compare(nothing, nothing, [Feed("f", {"input": np.ones((1, 3), F32)})], atol=1, rtol=0).passed


def test_an_output_below_the_tolerance_in_every_feed_is_not_compared(function_runner, feeds):
    whisper, silence = function_runner(lambda x: x * F32(1e-9)), function_runner(lambda x: x * F32(0))
    report = compare(whisper, silence, feeds, atol=1e-5, rtol=0)
    assert not report.passed
    assert "tells nothing" in report.reasons[0]
    # Agreement relative to the output's own scale does tell something, and so does one feed with a louder output.
    assert compare(whisper, whisper, feeds, atol=1e-5, rtol=0).passed
    louder = [*feeds, Feed("loud", {"input": np.full((1, 3), 1e9, F32)})]
    assert not compare(whisper, silence, louder, atol=1e-5, rtol=0).passed


def test_other_outputs_are_a_failure(function_runner, feeds):
    a, b = function_runner(np.copy, outputs=("a",)), function_runner(np.copy, outputs=("b",))
    report = compare(a, b, feeds, atol=1, rtol=0)
    assert not report.passed
    assert report.reasons[0] == "feed 1: outputs b instead of a"


def test_a_figure_over_all_feeds_is_missing_when_one_feed_was_not_compared(function_runner, feeds):
    def nan_at_batch_2(x):
        return x if len(x) == 1 else x * F32(np.nan)

    def wide_at_batch_2(x):
        return x if len(x) == 1 else x[:, :2]

    def raises_at_batch_2(x):
        return x if len(x) == 1 else x[5]["no"]

    right = function_runner(np.copy)
    for function in (nan_at_batch_2, wide_at_batch_2, raises_at_batch_2):
        report = compare(right, function_runner(function), feeds, atol=1, rtol=0)
        assert (report.passed, report.max_abs, report.max_scaled, report.top1) == (False, None, None, None)
        assert report.outputs[0].passed
    assert compare(right, right, feeds, atol=1, rtol=0).max_scaled == 0


def test_a_model_that_raises_is_a_failure_of_that_feed(function_runner, feeds):
    def only_batch_1(x):
        if len(x) > 1:
            raise ValueError("batch must be 1")
        return x

    report = compare(function_runner(np.copy), function_runner(only_batch_1, "narrow"), feeds, atol=1, rtol=0)
    assert report.reasons == ("feed 2: narrow fails: batch must be 1",)


def test_a_chain_names_the_hop_that_broke_and_runs_each_model_once_per_feed(function_runner, feeds):
    runners = [
        function_runner(np.copy, "folded"),
        function_runner(np.copy, "shrunk"),
        function_runner(lambda x: x + F32(0.1), "exported"),
        function_runner(lambda x: x + F32(0.1), "optimised"),
    ]
    report = compare_chain(runners, feeds, atol=1e-3, rtol=0)
    assert not report.passed
    assert report.broken == "shrunk -> exported"
    assert [hop.passed for hop in report.hops] == [True, False, True]
    assert [runner.calls for runner in runners] == [2, 2, 2, 2]
    assert compare_chain(runners[:2], feeds, atol=1e-3, rtol=0).broken is None


def test_tolerances_and_models_are_checked(function_runner, feeds):
    runner = function_runner(np.copy)
    for atol, rtol in ((-1, 0), (np.nan, 0), (np.inf, 0), (0, -1)):
        with pytest.raises(ValidationError, match="Tolerances"):
            compare(runner, runner, feeds, atol=atol, rtol=rtol)
    with pytest.raises(ValidationError, match="two models"):
        compare_chain([runner], feeds, atol=1, rtol=0)


# -- measured rounding ---------------------------------------------------------------------------------------------


def shaky(x):
    """x + 1000 − 1000 in float32: off by up to 3e-5 from x, and exact in float64."""
    return x + x.dtype.type(1000) - x.dtype.type(1000)


def rounding_chain(function_runner, candidate, precise, shaken=(), reference=shaky):
    feed = [Feed("any", {"input": np.linspace(-1, 1, 30, dtype=F32).reshape(10, 3)})]

    def double(function, name):
        return function_runner(lambda x: function(x.astype(np.float64)), name)

    chain = [function_runner(reference, "reference"), function_runner(candidate, "candidate")]
    runs = [double(function, f"shaken {k}") for k, function in enumerate(shaken)]
    return compare_chain(chain, feed, atol=1e-6, rtol=0, precise=double(precise, "float64"), shaken=runs).hops[0]


def test_rounding_that_float32_itself_shows_is_allowed(function_runner):
    hop = rounding_chain(function_runner, lambda x: x + F32(500) - F32(500), shaky)
    assert hop.passed
    assert hop.max_abs > 1e-6 >= hop.judged  # the rule alone would have refused it


def test_a_fault_beyond_measured_rounding_fails(function_runner):
    hop = rounding_chain(function_runner, lambda x: shaky(x) * F32(1.001), shaky)
    assert not hop.passed
    assert hop.judged > 1e-6


def test_a_reference_that_is_exact_by_luck_is_shaken(function_runner):
    """The reference shows no rounding on this feed, the shaken runs do: as much as they is allowed, and no more."""
    shaken = [lambda x, e=e: x + e for e in (3e-7, -4e-7)]
    for error, passed in ((1.5e-6, True), (1.7e-6, False)):
        candidate = lambda x, e=error: x + F32(e)  # noqa: E731
        hop = rounding_chain(function_runner, candidate, lambda x: x, shaken, reference=lambda x: x)
        assert hop.passed is passed
        assert (hop.judged <= 1e-6) is passed


def test_without_rounding_the_rule_alone_holds(function_runner):
    """The reference is exact here, so float64 grants nothing: an error above atol fails, one below passes."""
    for error, passed in ((2e-6, False), (5e-7, True)):
        candidate = lambda x, e=error: x + F32(e)  # noqa: E731
        hop = rounding_chain(function_runner, candidate, lambda x: x, reference=lambda x: x)
        assert hop.passed is passed


def test_float64_runs_only_where_the_rule_does_not_hold(function_runner):
    precise = function_runner(lambda x: x.astype(np.float64), "float64")
    runners = [function_runner(lambda x: x, name) for name in "ab"]
    feed = Feed("ones", {"input": np.ones((2, 3), F32)})
    assert compare_chain(runners, [feed], atol=1e-6, rtol=0, precise=precise).passed
    assert precise.calls == 0


@pytest.mark.parametrize("truth", [lambda x: x[:1], lambda x: x.astype(F32), lambda x: x * np.nan])
def test_a_float64_model_that_does_not_fit_grants_nothing(function_runner, truth):
    assert not rounding_chain(function_runner, lambda x: x + F32(500) - F32(500), truth).passed


def test_a_feed_on_which_float32_loses_everything_fails(function_runner):
    """The float64 model disagrees by 1 %: whatever the reason, no comparison on this feed can be trusted."""
    hop = rounding_chain(function_runner, lambda x: x + F32(1e-5), lambda x: x * 1.01)
    assert not hop.passed
    assert "nothing can be told" in hop.reasons[0]
    assert hop.judged == np.inf


# -- the dense model as the yardstick --------------------------------------------------------------------------------


def beside_dense(function_runner, error, dense_error, dense_scale=1.0, kinds=("torch", "file")):
    """A hop on an output of scale 8 that is off by `error`, beside a dense model that is off by `dense_error`."""
    feed = Feed("any", {"input": np.linspace(-8, 8, 30, dtype=F32).reshape(10, 3)})
    wanted = feed.arrays["input"]
    opened = []

    def end(name, answer):
        def opener():
            opened.append(name)
            return function_runner(lambda x: answer.astype(F32), f"dense in {name}")

        return opener if name in kinds else None

    dense = wanted * F32(dense_scale / 8)
    yardstick = [end("torch", dense), end("file", dense + F32(dense_error))]
    chain = [function_runner(np.copy, "shrunk"), function_runner(lambda x: x + F32(error), "exported")]
    report = compare_chain(chain, [feed], atol=1e-5, rtol=0, yardstick=yardstick)
    return report.hops[0], opened


def test_what_the_dense_model_differs_by_itself_is_allowed_and_said(function_runner):
    hop, opened = beside_dense(function_runner, error=9.2e-5, dense_error=9e-6)  # 1.15 times the limit of 8e-5
    assert opened == ["torch", "file"]
    assert hop.passed, hop.reasons
    assert hop.judged <= 1e-5 < hop.max_scaled
    assert "any: output: differs by 1.15e-05 of its scale, more than 1e-05; the dense model itself" in hop.notes[0]
    again = ParityReport.model_validate_json(hop.model_dump_json())
    assert again == hop


@pytest.mark.parametrize(
    ("error", "dense_error"),
    [
        (9.2e-5, 0.0),  # the dense model is exact: so must this one be
        (1.7e-4, 9e-6),  # more than twice what the dense model differs by, its scale being an eighth
        (1e-2, 1e-6),
        (8e-2, 2e-2),  # a dense model that is wrong itself vouches for nothing
    ],
)
def test_a_fault_beyond_the_yardstick_fails(function_runner, error, dense_error):
    hop, _ = beside_dense(function_runner, error, dense_error)
    assert not hop.passed
    assert hop.judged > 1e-5
    assert hop.notes == ()
    assert "elements differ by up to" in hop.reasons[0]


def test_the_yardstick_is_measured_in_shares_of_the_scale(function_runner):
    """A dense model of scale 80 that is off by 8e-4 is off by 1e-5 of it: no more than that for the small one."""
    assert beside_dense(function_runner, error=9.2e-5, dense_error=8e-4, dense_scale=80)[0].passed
    assert not beside_dense(function_runner, error=2.4e-4, dense_error=8e-4, dense_scale=80)[0].passed


def test_the_yardstick_is_left_alone_where_the_rule_holds_or_an_end_has_none(function_runner):
    hop, opened = beside_dense(function_runner, error=7e-5, dense_error=9e-6)
    assert (hop.passed, opened) == (True, [])
    hop, opened = beside_dense(function_runner, error=9.2e-5, dense_error=9e-6, kinds=("torch",))
    assert (hop.passed, opened) == (False, [])
    with pytest.raises(ValidationError, match="1 yardsticks for 2 models"):
        compare_chain([function_runner(np.copy)] * 2, [], atol=1, rtol=0, yardstick=[None])


def test_each_feed_has_a_yardstick_of_its_own(function_runner):
    """A feed on which the dense model differs much buys nothing for another one."""
    wild, calm = (Feed(name, {"input": np.full((2, 3), value, F32)}) for name, value in (("wild", 2), ("calm", 1)))
    off = lambda x: x + F32(1e-4)  # noqa: E731
    dense = lambda x: np.where(x > 1.5, off(x), x).astype(F32)  # noqa: E731
    hop = compare_chain(
        [function_runner(np.copy, "shrunk"), function_runner(off, "exported")],
        [wild, calm],
        atol=1e-5,
        rtol=0,
        yardstick=[lambda: function_runner(np.copy), lambda: function_runner(dense)],
    ).hops[0]
    assert [entry.passed for entry in hop.outputs] == [True, False]


class Wide:
    """A runner whose error shows only where it is asked for several rows, as the largest of several draws does."""

    def __init__(self, width: int, dtype: type, error: float) -> None:
        self.name, self.inputs, self.threads = "wide", (), 1
        self.width, self.dtype, self.error, self.rows = width, dtype, error, []

    def infer(self, feed):
        rows = len(feed["x"])
        self.rows.append(rows)
        return {"y": np.full((rows, self.width), self.error if rows > 1 else 0.0, self.dtype)}


@pytest.mark.parametrize(("width", "rows", "found"), [(1, [1, parity.FEW], 0.5), (parity.FEW, [1], 0.0)])
def test_rounding_of_few_numbers_is_measured_on_several_copies(width, rows, found):
    feed = Feed("one", {"x": np.zeros((1, 3), np.float32)})
    exact, shaken = Wide(width, np.float64, 0.0), Wide(width, np.float32, 0.5)
    first = {"y": np.zeros((1, width), np.float32)}
    assert parity._rounding(first, feed, exact, [shaken]) == {"y": found}
    assert shaken.rows == rows


class Says:
    """A model that answers the same whatever it is asked."""

    inputs, threads = (), 1

    def __init__(self, name, **outputs):
        self.name, self.outputs = name, outputs

    def infer(self, feed):
        return self.outputs


@pytest.mark.parametrize(
    ("reference", "candidate"),
    [
        (np.array([1_000_000, 3]), np.array([1_000_001, 3])),
        (np.array([1 << 60, 3]), np.array([(1 << 60) + 1, 3])),
        (np.array([2**64 - 1, 3], np.uint64), np.array([2**64 - 2, 3], np.uint64)),
        (np.array([True, False]), np.array([True, True])),
        (np.array(["cat", "dog"], object), np.array(["cat", "cow"], object)),
    ],
)
def test_what_has_no_tolerance_meets_no_limit_where_it_differs(reference, candidate):
    """Not even one that is far above the difference over its scale."""
    feeds = [Feed("feed", {"input": np.zeros((1, 3), F32)})]
    alike = compare(Says("a", ids=reference), Says("b", ids=reference.copy()), feeds, atol=1e-5, rtol=0)
    assert alike.passed, alike.reasons
    assert alike.judged == 0
    report = compare(Says("a", ids=reference), Says("b", ids=candidate), feeds, atol=1e3, rtol=0)
    assert not report.passed
    assert report.judged == np.inf
    assert "1 of 2" in report.reasons[0]
    assert report.worst.max_abs > 0
