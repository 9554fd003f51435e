"""Counts and choices: ratios, alignment, floors, overrides, global ranking."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foundation.errors import ConfigError
from pipeline.selection import Budget, allocate
from pipeline.selection.allocation import aligned_count


def cluster(name, size, unit=1, labels=None):
    return SimpleNamespace(name=name, size=size, unit=unit, labels=labels or {})


def test_the_lowest_scores_go():
    removed = allocate([cluster("a", 4)], {"a": np.array([3.0, 1.0, 4.0, 2.0])}, Budget(0.5))
    assert removed["a"].tolist() == [False, True, False, True]


def test_ratio_zero_removes_nothing_even_where_the_width_is_not_aligned():
    removed = allocate([cluster("a", 20)], {"a": np.arange(20.0)}, Budget(0.0, align=8))
    assert not removed["a"].any()


@pytest.mark.parametrize(
    ("size", "ratio", "kept"), [(64, 0.5, 32), (64, 0.33, 40), (24, 0.5, 16), (16, 0.9, 8), (6, 0.5, 3)]
)
def test_kept_channels_are_a_multiple_of_the_vector_block(size, ratio, kept):
    removed = allocate([cluster("a", size)], {"a": np.arange(float(size))}, Budget(ratio, align=8))
    assert size - removed["a"].sum() == kept


def test_a_head_is_aligned_by_the_channels_it_holds():
    heads = {"wide": np.arange(12.0), "narrow": np.arange(12.0)}
    removed = allocate([cluster("wide", 12, unit=64), cluster("narrow", 12, unit=4)], heads, Budget(0.6, align=8))
    assert 12 - removed["wide"].sum() == 5
    assert 12 - removed["narrow"].sum() == 4  # 5 heads of 4 channels would be 20 channels: no multiple of 8


def test_overrides_are_taken_from_the_last_matching_glob():
    clusters = [cluster("layer1.conv", 10), cluster("layer2.conv", 10)]
    scores = {c.name: np.arange(10.0) for c in clusters}
    removed = allocate(clusters, scores, Budget(0.5, overrides={"*": 0.8, "layer1.*": 0.0}))
    assert (removed["layer1.conv"].sum(), removed["layer2.conv"].sum()) == (0, 8)


def test_an_override_that_matches_nothing_names_the_nearest_layer():
    with pytest.raises(ConfigError, match="layer1.conv"):
        allocate(
            [cluster("layer1.conv", 4)], {"layer1.conv": np.arange(4.0)}, Budget(0.5, overrides={"layer1.cnv": 0.1})
        )


def test_global_scope_cuts_where_the_relative_scores_are_low():
    clusters = [cluster("even", 8), cluster("skewed", 8)]
    scores = {"even": np.full(8, 5.0), "skewed": np.array([0.1] * 6 + [9.0, 9.0])}
    removed = allocate(clusters, scores, Budget(6 / 16, scope="global"))
    assert removed["even"].sum() == 0
    assert removed["skewed"].tolist() == [True] * 6 + [False] * 2


def test_the_floor_holds_in_every_layer_under_global_ranking():
    clusters = [cluster("weak", 10), cluster("strong", 10)]
    scores = {"weak": np.array([1e-9] * 9 + [1.0]), "strong": np.full(10, 5.0)}
    removed = allocate(clusters, scores, Budget(0.5, scope="global", floor=0.4))
    assert 10 - removed["weak"].sum() == 4


@given(wanted=st.floats(0, 512), size=st.integers(1, 512), step=st.sampled_from([1, 4, 8, 16]))
def test_aligned_counts_are_in_range_and_aligned_or_whole(wanted, size, step):
    count = aligned_count(min(wanted, size), size, step)
    assert 1 <= count <= size
    if size > step:
        assert count % step == 0 or count == size
