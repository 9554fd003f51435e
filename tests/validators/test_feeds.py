import numpy as np
import pytest

from validators import InputSpec, ValidationError, edge_feeds, random_feeds, real_feeds
from validators.feeds import BATCHES, drawn_batches
from validators.integers import Whole

IMAGE = (InputSpec(name="image", shape=("batch", 3, 4, 4), dtype="float32"),)
TEXT = (
    InputSpec(name="ids", shape=("n", "length"), dtype="int64"),
    InputSpec(name="mask", shape=("n", "length"), dtype="bool"),
)


def test_random_feeds_come_at_every_batch_size_and_are_seeded():
    feeds = random_feeds(IMAGE, seed=0)
    assert [feed.arrays["image"].shape for feed in feeds] == [(1, 3, 4, 4), (3, 3, 4, 4), (8, 3, 4, 4)]
    assert [feed.label for feed in feeds] == ["random, batch 1", "random, batch 3", "random, batch 8"]
    assert all(feed.arrays["image"].dtype == np.float32 for feed in feeds)
    again, other = random_feeds(IMAGE, seed=0), random_feeds(IMAGE, seed=1)
    np.testing.assert_array_equal(feeds[2].arrays["image"], again[2].arrays["image"])
    assert not np.array_equal(feeds[2].arrays["image"], other[2].arrays["image"])


def test_token_ids_stay_in_their_range_and_reach_it():
    feeds = random_feeds(TEXT, seed=0, batches=[8], sizes={"length": 200}, ranges={"ids": (5, 30)})
    ids, mask = feeds[0].arrays["ids"], feeds[0].arrays["mask"]
    assert (ids.shape, ids.dtype, ids.min(), ids.max()) == ((8, 200), np.int64, 5, 29)
    assert (mask.dtype, mask.any(), mask.all()) == (np.bool_, True, False)
    zeros, large = edge_feeds(TEXT, seed=0, batches=[1], sizes={"length": 2}, ranges={"ids": (5, 30)})
    assert zeros.arrays["ids"].tolist() == [[5, 5]]
    assert large.arrays["ids"].tolist() == [[29, 29]]
    assert large.arrays["mask"].tolist() == [[True, True]]


@pytest.mark.parametrize("last", [5, 17, 29])
def test_a_token_that_ends_each_sentence_stands_nowhere_else(last):
    ranges = {"ids": Whole(5, 30, last)}
    made = [
        *random_feeds(TEXT, seed=0, batches=[8], sizes={"length": 200}, ranges=ranges),
        *edge_feeds(TEXT, seed=0, batches=[8], sizes={"length": 200}, ranges=ranges),
    ]
    drawn, *edges = (feed.arrays["ids"] for feed in made)
    assert all((ids[:, -1] == last).all() and ids.dtype == np.int64 for ids in (drawn, *edges))
    assert (drawn == last).sum() == 8 and set(drawn.ravel().tolist()) == set(range(5, 30))
    assert [set(ids[:, :-1].ravel().tolist()) for ids in edges] == [{5}, {29}]
    (alone,) = random_feeds(TEXT, seed=0, batches=[2], sizes={"length": 3}, ranges={"ids": Whole(4, 5, 4)})
    assert alone.arrays["ids"].tolist() == [[4, 4, 4]] * 2


def test_integers_without_a_range_are_valid_everywhere():
    ids = random_feeds(TEXT, seed=0, batches=[8], sizes={"length": 50})[0].arrays["ids"]
    assert sorted(np.unique(ids).tolist()) == [0, 1]


def test_edges_are_zeros_and_large_values_of_both_signs():
    feeds = {feed.label: feed.arrays["image"] for feed in edge_feeds(IMAGE, seed=0)}
    assert len(feeds) == 6
    assert not feeds["zeros, batch 3"].any()
    assert np.unique(feeds["large, batch 3"]).tolist() == [-1000, 1000]


def test_a_fixed_batch_is_fed_at_that_size_alone():
    fixed = (InputSpec(name="image", shape=(2, 3), dtype="float32"),)
    (feed,) = random_feeds(fixed, seed=0)
    assert feed.arrays["image"].shape == (2, 3)


def test_a_dynamic_dimension_without_a_size_is_named():
    with pytest.raises(ValidationError, match="Input ids has a dynamic dimension length"):
        random_feeds(TEXT, seed=0)


def test_a_model_without_inputs_cannot_be_fed():
    with pytest.raises(ValidationError, match="no inputs"):
        random_feeds((), seed=0)


def test_real_feeds_are_the_first_samples():
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    feeds = real_feeds({"image": x})
    assert [feed.label for feed in feeds] == ["real, batch 1", "real, batch 3"]
    np.testing.assert_array_equal(feeds[1].arrays["image"], x[:3])
    with pytest.raises(ValidationError, match="0 samples"):
        real_feeds({"image": x[:0]})


def test_drawn_batches_are_others_than_the_fixed_ones_and_hang_on_the_seed_alone():
    drawn = [drawn_batches(seed) for seed in range(200)]
    assert all(batches[:3] == BATCHES and len(set(batches)) == 5 for batches in drawn)
    assert all(2 <= batches[3] <= 8 and 9 <= batches[4] <= 32 for batches in drawn)
    assert len(set(drawn)) > 50
    assert drawn_batches(7) == drawn[7]


def test_a_scalar_input_is_an_array():
    scalar = (InputSpec(name="t", shape=(), dtype="float32"), InputSpec(name="n", shape=(), dtype="int64"))
    for feed in random_feeds(scalar, seed=0) + edge_feeds(scalar, seed=0):
        assert all(isinstance(array, np.ndarray) and array.shape == () for array in feed.arrays.values())
