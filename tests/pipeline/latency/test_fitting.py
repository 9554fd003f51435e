"""Known costs are found again: made-up operators whose times are sums of the terms, seen at a few widths."""

from dataclasses import replace

import numpy as np
import pytest

from pipeline.latency.fitting import Sample, fit
from pipeline.latency.matching import Operator
from pipeline.latency.sizes import Sizes
from pipeline.latency.work import work

SIZES = Sizes(
    clusters=("a", "b"), whole=np.array([64.0, 32.0]), base=np.array([64.0, 32.0]), each=np.array([[1.0, 0], [0, 1.0]])
)


def conv(name, ins, outs, *, block, space=14):
    """A convolution as onnxruntime blocks it; a microsecond and something for each block of products."""
    up_in, up_out = (-(-n // block) * block for n in (ins, outs))
    share = 0.002 + 1.5e-4 * up_in * up_out + 2e-4 * up_out
    return Operator(name, "Conv", ((1, ins, space, space), (outs, ins, 3, 3)), ((1, outs, space, space),), share)


def linear(name, ins, outs, rows=1):
    return Operator(name, "Gemm", ((rows, ins), (outs,)), ((rows, outs),), 0.001 + 2e-5 * ins * outs)


def sample(a, b, *, block=8, extra=(), fixed=0.01, noise=1.0):
    operators = (
        conv("first", 3, a, block=block, space=28), conv("second", a, b, block=block),
        conv("third", b, a, block=block), linear("head", a, 10), *extra,
    )  # fmt: skip
    return Sample({"a": a, "b": b}, fixed + noise * sum(o.share for o in operators), operators)


def drawn(count, seed, step=8, **more):
    draw = np.random.default_rng(seed)
    pairs = [(64, 32), *((int(draw.integers(1, 64 // step + 1)) * step, int(draw.integers(1, 32 // step + 1)) * step)
                         for _ in range(count - 1))]  # fmt: skip
    return [sample(a, b, **more) for a, b in pairs]


def reordered(a, b):
    """A layer that is not whole costs an operator more, and the others other names."""
    if a == 64:
        return sample(a, b)
    operators = (
        conv("first", 3, a, block=8, space=28), conv("x_second", a, b, block=8), conv("x_third", b, a, block=8),
        Operator("x_reorder", "Reorder", ((1, b, 14, 14),), ((1, b, 14, 14),), 6e-4 * b), linear("x_head", a, 10),
    )  # fmt: skip
    return Sample({"a": a, "b": b}, 0.01 + sum(o.share for o in operators), operators)


def fit_of_reordered():
    draw = np.random.default_rng(0)
    pairs = [(64, 32), *((int(draw.choice([64, 56, 40, 24, 8])), int(draw.integers(1, 5)) * 8) for _ in range(17))]
    return fit([reordered(a, b) for a, b in pairs], SIZES, (8,))


def errors(made, samples):
    kept = np.array([SIZES.kept(one.kept) for one in samples])
    return np.abs(made.ratio(kept) / [one.ratio for one in samples] - 1)


def test_times_of_widths_that_were_not_seen_are_found():
    made = fit(drawn(14, 0), SIZES, (1, 8))
    assert errors(made, drawn(40, 1)).max() < 0.01
    assert made.error < 0.01 and len(made.checked) == 14


def test_the_block_that_the_kernels_take_is_found_from_widths_off_it():
    made = fit(drawn(24, 0, step=1, block=16), SIZES, (1, 8, 16, 32))
    assert made.block == 16
    assert errors(made, drawn(40, 1, step=1, block=16)).max() < 0.06


def test_what_writing_down_costs_and_a_disturbed_profile_are_not_the_models_time():
    plain = drawn(14, 0)
    draw = np.random.default_rng(2)
    told = [
        replace(
            one,
            operators=tuple(replace(o, share=(o.share + 0.01) * disturbed) for o in one.operators),
        )
        for one, disturbed in zip(plain, 1 + 0.2 * draw.random(len(plain)), strict=True)
    ]
    assert errors(fit(told, SIZES, (8,)), drawn(40, 1)).max() < 0.06


@pytest.mark.parametrize("factor", [0.4, 2.0])
def test_a_model_whose_session_lay_badly_in_memory_does_not_bend_the_table(factor):
    plain = drawn(14, 0)
    at = min(range(len(plain)), key=lambda n: plain[n].ratio)
    odd = replace(plain[at], ratio=plain[at].ratio * factor)
    made = fit([*plain[:at], odd, *plain[at + 1 :]], SIZES, (8,))
    test = [one for one in drawn(40, 1) if one.ratio > 0.2]
    assert np.median(errors(made, test)) < 0.025  # 0.065 and 0.034 where every model counts the same
    assert made.error < 0.15


@pytest.mark.parametrize("whole", [60, 58])
def test_a_depthwise_convolution_off_the_block_is_told_from_one_on_it(whole):
    """Which kernel takes it hangs on that: 58 channels take several times as long as 48 and 64 do."""

    def one(a):
        share = 1e-3 * a * (5 if a % 16 else 1)
        return Sample(
            {"a": a}, share, (Operator("dw", "Conv", ((1, a, 28, 28), (a, 1, 3, 3)), ((1, a, 28, 28),), share),)
        )

    sizes = Sizes(("a",), np.array([float(whole)]), np.array([float(whole)]), np.eye(1))
    made = fit([one(a) for a in (whole, 48, 32, 16, whole, 48, 32, 16)], sizes, (16,))
    assert made.ratio(np.array([[whole], [48.0], [16.0]])) == pytest.approx(
        [one(a).ratio for a in (whole, 48, 16)], rel=0.02
    )


def test_where_the_graph_hangs_on_a_width_each_graph_has_operators_of_its_own():
    test = [reordered(a, b) for a in (64, 48, 32, 16) for b in (8, 24)]
    assert errors(fit_of_reordered(), test).max() < 0.02


@pytest.mark.parametrize("seed", range(4))
def test_a_choice_and_its_neighbours_cost_what_all_of_them_together_do(seed):
    made, draw = fit_of_reordered(), np.random.default_rng(seed)
    assert any(one.where.of is not None for one in made.placed)
    for _ in range(6):  # with what went as a whole, and more than once the same sizes
        kept = np.array([draw.choice([64, 40, 8, 0]), draw.choice([32, 16, 0])], float)
        counts = [(1, (32, 24, 8, 0)), (0, (64, 60, 8))][:: int(draw.choice([1, -1]))]
        assert made.of(kept) == pytest.approx(made.ratio(kept[None])[0], rel=1e-12)
        for (number, each), found in zip(counts, made.along(kept, counts), strict=True):
            rows = np.repeat(kept[None], len(each), axis=0)
            rows[:, number] = each
            np.testing.assert_allclose(found, made.ratio(rows), rtol=1e-12)
    assert made.along(kept, []) == []


def test_operators_that_the_runtime_put_in_are_told_by_their_places_for_their_names_change():
    def one(a, b, swapped):
        names = ["Reorder_token_7", "Reorder"] if swapped else ["Reorder", "Reorder_token_7"]
        put_in = [
            Operator(name, "Reorder", ((1, n, 14, 14),), ((1, n, 14, 14),), 1e-3 * n)
            for name, n in zip(names, (a, b), strict=True)
        ]
        first, second, third, head = sample(a, b).operators
        operators = (first, put_in[0], second, put_in[1], third, head)
        return Sample({"a": a, "b": b}, sum(o.share for o in operators), operators)

    draw = np.random.default_rng(0)
    pairs = [(int(draw.integers(1, 9)) * 8, int(draw.integers(1, 5)) * 8) for _ in range(40)]
    made = fit([one(a, b, n % 2 == 1) for n, (a, b) in enumerate(pairs[:14])], SIZES, (8,))
    assert errors(made, [one(a, b, False) for a, b in pairs[14:]]).max() < 0.02


def test_a_wider_layer_is_never_said_to_be_free_of_cost():
    made = fit(drawn(14, 0, noise=0.9), SIZES, (1, 8))
    widths = np.array([[float(a), 16.0] for a in range(8, 65, 8)])
    assert (np.diff(made.ratio(widths)) > 0).all()


@pytest.mark.parametrize(
    ("kind", "inputs", "outputs", "want"),
    [
        ("Conv", [[1, 8, 14, 14], [8, 1, 3, 3]], [[1, 8, 14, 14]], "depthwise"),
        ("Conv", [[1, 8, 28, 28], [8, 1, 3, 3]], [[1, 8, 14, 14]], "depthwise"),
        ("MatMul", [[1, 16, 32]], [[1, 16, 64]], "MatMul"),
        ("LSTM", [[10, 1, 8], [1, 64, 8]], [[10, 1, 1, 16]], "LSTM"),
        ("Softmax", [[1, 3, 16, 16]], [[1, 3, 16, 16]], "Softmax"),
    ],
)
def test_each_kind_of_work_has_terms(kind, inputs, outputs, want):
    found = work(kind, inputs, outputs, 8)
    assert found.key[0] == want and len(found.terms) > 1 and all(np.isfinite(found.terms))


def test_a_stride_makes_another_kind_of_work():
    keys = {work("Conv", [[1, 8, n, n], [8, 1, 3, 3]], [[1, 8, 14, 14]], 8).key for n in (14, 28)}
    assert len(keys) == 2


def test_operators_of_a_branch_that_is_gone_cost_nothing_not_even_their_constant():
    constant = 0.05

    def one(a, b):
        branch = [
            replace(o, share=o.share + constant) for o in (conv("into", a, b, block=8), conv("out", b, a, block=8))
        ]
        rest = [conv("first", 3, a, block=8, space=28), linear("head", a, 10)]
        operators = (*rest, *(branch if b else ()))
        return Sample({"a": a, "b": b}, sum(o.share for o in operators), operators)

    draw = np.random.default_rng(0)
    pairs = [(int(draw.integers(1, 9)) * 8, int(draw.integers(1, 5)) * 8) for _ in range(14)]
    made = fit([one(a, b) for a, b in pairs], SIZES, (8,))
    assert errors(made, [one(a, b) for a in (64, 24) for b in (32, 16)]).max() < 0.02
    assert errors(made, [one(a, 0) for a in (64, 40, 16)]).max() < 0.02


def slowed(samples, whole):
    """Models that take `whole` (share of what the dense one's operators take together -> share of its time)."""
    sums = [sum(o.share for o in one.operators) for one in samples]
    return [replace(one, ratio=whole(s / sums[0])) for one, s in zip(samples, sums, strict=True)]


@pytest.mark.parametrize(
    ("whole", "worst"),
    [
        (lambda share: 0.6 * share + 0.4 * share**1.5, 0.05),
        # Weights that no longer fit into the caches are read from memory in every inference.
        (lambda share: share * (0.5 + 0.5 * min(max(share / 0.25 - 1, 0), 1)), 0.15),
    ],
    ids=["the more the larger it is", "from where the caches are full"],
)
def test_a_whole_model_may_take_longer_than_its_operators(whole, worst):
    told = slowed([sample(64, 32), *drawn(20, 0)], whole)
    found = errors(fit(told, SIZES, (8,)), slowed([sample(64, 32), *drawn(40, 1)], whole))
    assert np.median(found) < 0.04 and found.max() < worst


@pytest.mark.parametrize("small", [1, 4])
def test_a_size_from_which_caches_are_full_is_taken_from_several_models(small):
    """One alone that is fast for its size may have lain well in memory; what lies between it and the others is not
    told by it.
    """
    draw = np.random.default_rng(0)
    large = [(int(draw.integers(4, 9)) * 8, int(draw.integers(2, 5)) * 8) for _ in range(13)]
    told = [sample(64, 32), *(sample(a, b) for a, b in large)]
    told += [replace(one, ratio=0.5 * one.ratio) for one in map(sample, (8, 8, 16, 8), (8, 16, 8, 24)[:small])]
    knee = fit(told, SIZES, (8,)).knee
    assert (knee is not None and knee < 0.15) == (small > 1)


def test_caches_slow_what_grows_and_not_the_constants():
    """A branch of small operators, each of which takes longer than its profile says: the model without that branch
    shows that it is not the session's own time, and full caches slow the convolutions alone.
    """

    def cached(a, b):
        first, second, third, head = sample(a, b or 8).operators
        small = [Operator(f"cast_{n}", "Cast", ((1, b),), ((1, b),), 0.012) for n in range(12)] if b else []
        large = (first, second, third, head) if b else (first, head)
        grows = sum(o.share for o in large)
        ratio = 0.015 * len(small) + grows * (0.5 + 0.5 * min(max(grows / 0.3 - 1, 0), 1))
        return Sample({"a": a, "b": b}, ratio, (*large[:-1], *small, head))

    draw = np.random.default_rng(0)
    pairs = [(64, 32), *((int(draw.integers(1, 9)) * 8, int(draw.integers(1, 5)) * 8) for _ in range(13)), (64, 0)]
    made = fit([cached(a, b) for a, b in pairs], SIZES, (8,), [["b"]])
    found = errors(made, [cached(a, b) for a in range(8, 65, 8) for b in (8, 16, 24, 32)])
    assert np.median(found) < 0.02 and found.max() < 0.2


def test_what_writing_down_costs_is_told_from_what_operators_cost():
    """Of twelve small ones it takes more than of a convolution, and more than they take themselves."""

    def written(a, b):
        made = sample(a, b, fixed=0.0)
        small = [Operator(f"cast_{n}", "Cast", ((1, a),), ((1, a),), 0.001 + 1e-6 * a) for n in range(12)]
        ratio = made.ratio + sum(o.share for o in small)
        operators = [replace(o, share=o.share + 0.002) for o in made.operators]
        operators += [replace(o, share=o.share + 0.02) for o in small]
        return replace(made, ratio=ratio, operators=tuple(operators))

    draw = np.random.default_rng(0)
    pairs = [(64, 32), *((int(draw.integers(1, 9)) * 8, int(draw.integers(1, 5)) * 8) for _ in range(14))]
    made = fit([written(a, b) for a, b in pairs], SIZES, (8,))
    assert errors(made, [written(a, b) for a in (8, 24, 40, 64) for b in (8, 16, 32)]).max() < 0.06


def test_a_pool_off_the_block_is_slower_and_no_less_for_more_channels():
    def pool(width, space=28):
        slow = 4 if width % 16 else 1
        shapes = (((1, width, space, space),), ((1, width, space // 2, space // 2),))
        return Operator("pool", "AveragePool", *shapes, 1e-3 * slow * width)

    def one(a, b):
        return sample(a, b, block=16, extra=(pool(a),))

    draw = np.random.default_rng(0)
    pairs = [(int(draw.integers(1, 9)) * 8, int(draw.integers(1, 5)) * 8) for _ in range(15)]
    made = fit([one(a, b) for a, b in pairs], SIZES, (1, 8, 16, 32))
    assert errors(made, [one(a, b) for a in (16, 24, 40, 48, 64) for b in (8, 24, 32)]).max() < 0.05


def test_convolutions_whose_kernels_are_not_told_have_costs_of_their_own():
    """Those of 8-bit integers, channels last, weights packed away: a 1x1 and a 3x3 kernel look alike."""

    def integers(name, ins, outs, kernel):
        shapes = (((1, 14, 14, ins), (), (), (outs,), (outs,), (), (), (outs,)), ((1, 14, 14, outs),))
        return Operator(name, "QLinearConv", *shapes, 0.002 + 2e-5 * kernel**2 * ins * outs)

    def one(a, b):
        pool = Operator("pool", "NhwcMaxPool", ((1, 14, 14, a),), ((1, 7, 7, a),), 1e-3 * a)
        operators = (integers("in", a, b, 3), integers("beside", a, b, 1), integers("out", b, a, 1), pool)
        return Sample({"a": a, "b": b}, sum(o.share for o in operators), operators)

    draw = np.random.default_rng(0)
    pairs = [(64, 32), *((int(draw.integers(1, 9)) * 8, int(draw.integers(1, 5)) * 8) for _ in range(14))]
    made = fit([one(a, b) for a, b in pairs], SIZES, (1, 8))
    assert errors(made, [one(a, b) for a in (64, 40, 24, 8) for b in (8, 32)]).max() < 0.02


@pytest.mark.parametrize(
    ("kind", "inputs", "out", "channels"),
    [
        ("QLinearConv", [[1, 8, 8, 24], [], [], [16], [16], [], [], [16]], [1, 8, 8, 16], (24, 16)),
        ("QLinearConv", [[1, 24, 8, 8], [], [], [16], [16], [], [], [16]], [1, 16, 8, 8], (24, 16)),
        ("QLinearConv", [[1, 24, 8, 8], [], [], [16, 24, 3, 3], [16], [], [], [16]], [1, 16, 8, 8], (24, 16)),
        ("NhwcMaxPool", [[1, 8, 8, 24]], [1, 4, 4, 24], (24, 24)),
        ("QLinearGlobalAveragePool", [[1, 8, 8, 24], [], [], [], []], [1, 1, 1, 24], (24, 24)),
        ("QLinearGlobalAveragePool", [[1, 24, 8, 8], [], [], [], []], [1, 24, 1, 1], (24, 24)),
    ],
)
def test_channels_are_found_where_they_are(kind, inputs, out, channels):
    key, terms, _ = work(kind, inputs, [out], 1)
    assert 24 not in key and 16 not in key and 8 in key
    if "Conv" in kind:
        assert terms[1] == channels[0] * channels[1]


def with_a_branch(a, b):
    """A norm before and an addition behind the layers of a branch go with it, and what the addition did beside stays
    as an operator of its own.
    """
    first, second, third, head = sample(a, b or 8).operators

    def over(kind, name, cost):
        return Operator(name, kind, ((1, a, 14, 14),), ((1, a, 14, 14),), cost * a)

    inside = over("Norm", "norm", 3e-4), second, third, over("Add", "sum", 2e-4)
    operators = first, *(inside if b else (over("Relu", "act", 1e-4),)), head
    return Sample({"a": a, "b": b}, 0.01 + sum(o.share for o in operators), operators)


@pytest.mark.parametrize("told", [True, False])
def test_what_stands_beside_a_branch_goes_with_it(told):
    draw = np.random.default_rng(0)
    pairs = [(64, 32), *((int(draw.integers(1, 9)) * 8, int(draw.integers(1, 5)) * 8) for _ in range(13)), (64, 0)]
    made = fit([with_a_branch(a, b) for a, b in pairs], SIZES, (8,), [["b"]] if told else ())
    widths = errors(made, [with_a_branch(a, b) for a in (56, 40, 16) for b in (8, 24)])
    gone = errors(made, [with_a_branch(a, 0) for a in (64, 48, 16)])
    assert widths.max() < 0.02 and gone.max() < 0.03 if told else gone.max() > 0.2
    assert len(made.checked) == 14 + (not told)  # how far off widths are is not told from a branch


@pytest.mark.parametrize("fused", [False, True])
def test_of_several_branches_each_takes_what_stands_beside_it(fused):
    """`fused`: a layer between them adds up what it reads as well, but not where they are gone; it never goes."""
    sizes = replace(
        SIZES, clusters=("a", "b", "c"), whole=np.array([64.0, 32, 32]), base=np.array([64.0, 32, 32]), each=np.eye(3)
    )

    def one(a, b, c):
        first, second, third, head = sample(a, b or 8).operators
        _, fourth, fifth, _ = sample(a, c or 8).operators

        def over(kind, cost):
            return Operator(kind, kind, ((1, a, 14, 14),), ((1, a, 14, 14),), cost * a)

        early = (over("Norm", 3e-4), second, third, over("Add", 2e-4)) if b else ()
        late = (over("Norm", 3e-4), fourth, fifth, over("Add", 2e-4)) if c else ()
        between = conv("between", a, a, block=8)
        if b or c:
            between = replace(between, inputs=(*between.inputs, between.outputs[0]))
        operators = first, *early, *((between,) if fused else ()), *late, over("Norm", 3e-4), head
        return Sample({"a": a, "b": b, "c": c}, 0.01 + sum(o.share for o in operators), operators)

    draw = np.random.default_rng(0)
    widths = [(int(draw.integers(1, 9)) * 8, *(int(n) * 8 for n in draw.integers(1, 5, 2))) for _ in range(13)]
    made = fit([one(*choice) for choice in [(64, 32, 32), *widths, (64, 0, 0)]], sizes, (8,), [["b"], ["c"]])
    test = [one(a, *pair) for a in (64, 24) for pair in ((0, 16), (16, 0), (0, 0))]
    found = made.ratio(np.array([sizes.kept(s.kept) for s in test]))
    assert np.abs(found / [s.ratio for s in test] - 1).max() < 0.03


def test_what_is_outside_a_branch_and_looks_like_what_is_inside_stays():
    """Dense, both convolutions are of 64 channels and 64, and only which widths they follow tells them apart."""
    sizes = replace(SIZES, clusters=("a", "c"), whole=np.array([64.0, 64]), base=np.array([64.0, 64]))

    def one(a, c):
        def softmax(n):
            return Operator("softmax", "Softmax", ((1, n, 14, 14),), ((1, n, 14, 14),), 1e-3 * n)

        layers = conv("stem", 3, a, block=8, space=28), conv("outside", a, a, block=8), softmax(a)
        inside = (conv("in", a, c, block=8), softmax(c), conv("out", c, a, block=8)) if c else ()
        operators = *layers, *inside, linear("head", a, 10)
        return Sample({"a": a, "c": c}, 0.01 + sum(o.share for o in operators), operators)

    draw = np.random.default_rng(0)
    widths = [tuple(int(n) * 8 for n in draw.integers(1, 9, 2)) for _ in range(13)]
    made = fit([one(*choice) for choice in [(64, 64), *widths, (64, 0)]], sizes, (8,), [["c"]])
    test = [one(a, c) for a in (64, 40, 24) for c in (0, 24, 48)]
    found = made.ratio(np.array([sizes.kept(s.kept) for s in test]))
    assert np.abs(found / [s.ratio for s in test] - 1).max() < 0.02
