"""Operators of models cut to other widths are found again, whatever their names; and which widths have them."""

from dataclasses import replace

import numpy as np
import pytest

from pipeline.latency.fitting import Sample, fit
from pipeline.latency.matching import Operator, Where, likeliest, matched, where
from pipeline.latency.sizes import Sizes


def op(name, kind, width, space=8, share=0.01):
    shape = (1, space, space, width)
    return Operator(name, kind, (shape,), (shape,), share)


def block(width, full, at):
    """A norm over a stream, beside pads where a part of the stream is gone, and two products; named in a row."""
    padded = [op("", "Pad", width), op("", "Norm", full), op("", "Slice", full)]
    norm = [op("", "Norm", width)] if width == full else padded
    return [
        replace(one, name=f"node_{at + n}") for n, one in enumerate([*norm, op("", "MatMul", 64), op("", "MatMul", 32)])
    ]


def kinds(columns):
    return [column[0][1].kind for column in columns]


def test_operators_that_others_have_not_leave_the_rest_matched_whatever_the_names():
    models = [[*block(16, 16, 0), *block(width, 16, 10), *block(16, 16, 20)] for width in (16, 8, 16, 12)]
    columns = matched(models)
    assert kinds(columns) == [*["Norm", "MatMul", "MatMul"], *["Pad", "Norm", "Slice", "MatMul", "MatMul"],
                              *["Norm", "MatMul", "MatMul"]]  # fmt: skip
    having = [[number for number, _ in column] for column in columns]
    assert having == [[0, 1, 2, 3] if kind not in ("Pad", "Slice") else [1, 3] for kind in kinds(columns)]


def test_repeated_blocks_are_told_apart_by_the_sizes_that_do_not_change():
    small, large = [op("a", "Conv", 8, space=4), op("b", "Relu", 8, space=4)], [op("c", "Conv", 8, space=16)]
    columns = matched([[*large, *small], [*small], [*large, *small]])
    assert [[number for number, _ in column] for column in columns] == [[0, 2], [0, 1, 2], [0, 1, 2]]


def test_another_order_is_found_by_the_name():
    one, other = op("one", "Conv", 8), op("other", "Pool", 8)
    columns = matched([[one, other, op("last", "Relu", 8)], [other, one, op("last", "Relu", 8)]])
    assert sorted((column[0][1].name, column[1][1].name) for column in columns) == [
        ("last", "last"), ("one", "one"), ("other", "other"),
    ]  # fmt: skip


def test_another_order_of_two_branches_is_found_without_names():
    """The runtime puts an operator in where a width is on its block, and runs the other branch first then."""

    def one(width, number):
        left, right = op("", "Conv", width), op("", "Pool", width)
        both = [right, op("", "Reorder", width), left] if width % 8 == 0 else [left, right]
        chain = [op("", "Norm", width), *both, op("", "Sum", width), *([op("", "Relu", width)] * 20), op("", "Conv", 4)]
        return [replace(o, name=f"{number}_{n}") for n, o in enumerate(chain)]

    columns = matched([one(width, number) for number, width in enumerate((8, 6, 16, 5))])
    assert {column[0][1].kind: len(column) for column in columns if column[0][1].numbers[-1] != 4} == {
        "Norm": 4, "Conv": 4, "Pool": 4, "Reorder": 2, "Sum": 4, "Relu": 4,
    }  # fmt: skip
    assert [len(c) for c in columns if c[0][1].kind == "Conv"] == [4, 4], "never the one that is far away"


def test_every_operator_is_in_one_column_and_each_column_has_a_model_once():
    draw = np.random.default_rng(0)
    models = [
        [op(f"n{draw.integers(9)}", "ABC"[draw.integers(3)], 8 * int(draw.integers(1, 3))) for _ in range(12)]
        for _ in range(6)
    ]
    columns = matched(models)
    for number, operators in enumerate(models):
        mine = [one for column in columns for at, one in column if at == number]
        assert sorted(map(id, mine)) == sorted(map(id, operators))
    assert all(len({number for number, _ in column}) == len(column) for column in columns)
    assert all(len({one.letter for _, one in column}) == 1 for column in columns)


def test_convolutions_of_other_kernels_are_never_one_operator():
    def conv(kernel):
        return Operator("conv", "Conv", ((1, 8, 8, 8), (8, 8, kernel, kernel)), ((1, 8, 8, 8),), 0.1)

    assert len(matched([[conv(3)], [conv(1)]])) == 2
    assert len(matched([[conv(3)], [conv(3)]])) == 1


WHOLE = np.array([[True, True], [True, False], [False, True], [False, False], [True, False], [False, True]] * 2)


@pytest.mark.parametrize(
    ("present", "rule"),
    [
        (np.ones(12, bool), (Where(),)),
        (WHOLE[:, 0], (Where(0, True),)),
        (~WHOLE[:, 1], (Where(1, False),)),
        (~WHOLE[:, 1] ^ (np.arange(12) == 3), (Where(1, False),)),
        (np.arange(12) < 10, (Where(),)),
        (np.arange(12) == 5, ()),
    ],
    ids=["always", "where it is whole", "where it is not", "one stray", "nearly always", "hardly ever"],
)
def test_the_rule_by_which_a_model_has_an_operator(present, rule):
    assert where(present, WHOLE) == rule
    assert all((one.at(WHOLE) != present).sum() <= 2 for one in rule)


def test_each_stream_that_is_cut_costs_pads_of_its_own():
    sizes = Sizes(("a", "b"), np.array([32.0, 32.0]), np.array([32.0, 32.0]), np.eye(2))

    def model(a, b):
        made = [*block(a, 32, 0), *block(b, 32, 30 if a == 32 else 60)]
        return Sample({"a": a, "b": b}, 0.0, tuple(replace(one, share=1e-3 * one.inputs[0][-1]) for one in made))

    def timed(one):
        return replace(one, ratio=sum(o.share for o in one.operators))

    draw = np.random.default_rng(1)
    pairs = [
        (32, 32),
        *((int(draw.choice([32, 32, 24, 16, 8])), int(draw.choice([32, 32, 24, 16, 8]))) for _ in range(15)),
    ]
    made = fit([timed(model(a, b)) for a, b in pairs], sizes, (1, 8))
    test = [timed(model(a, b)) for a in (32, 28, 12) for b in (32, 20, 8)]
    found = made.ratio(np.array([sizes.kept(one.kept) for one in test]))
    assert np.abs(found / [one.ratio for one in test] - 1).max() < 0.02


def test_what_only_the_dense_model_has_hangs_on_the_layer_beside_it():
    """All layers are whole there, so that each of them explains it as well: a shuffle that stays a transpose, say."""
    sizes = Sizes(("a", "b"), np.array([32.0, 32.0]), np.array([32.0, 32.0]), np.eye(2))

    def model(a, b):
        made = []
        for width, space in ((a, 8), (b, 4)):
            made += [op(f"m{space}", "MatMul", width, space, 1e-3 * width)]
            made += [op(f"t{space}", "Transpose", 64, space, 0.02)] if width == 32 else []
        made.append(op("last", "Gemm", 10))
        return Sample({"a": a, "b": b}, sum(o.share for o in made), tuple(made))

    draw = np.random.default_rng(0)
    pairs = [(32, 32), *((int(draw.integers(1, 8)) * 4, int(draw.integers(1, 8)) * 4) for _ in range(14))]
    made = fit([model(a, b) for a, b in pairs], sizes, (1,))
    test = [model(*pair) for pair in ((32, 16), (16, 32), (32, 32), (8, 16))]
    found = made.ratio(np.array([sizes.kept(one.kept) for one in test]))
    assert np.abs(found / [one.ratio for one in test] - 1).max() < 0.03


def test_of_rules_that_are_as_good_the_nearest_followed_cluster_decides():
    rules = (Where(0), Where(1), Where(2, False))
    followed = [frozenset({0}), frozenset(), frozenset(), frozenset({2}), frozenset({1})]
    assert likeliest(rules, 2, followed) == Where(2, False)
    assert likeliest(rules, 1, followed) == Where(0)
    assert likeliest(rules, 0, [frozenset()]) == Where(0)
    assert likeliest(rules[1:2], 0, followed) == Where(1)
