"""What a target may be, in whose units, and that a recipe's latency is the one that the gate judges."""

import pytest

from foundation.errors import ConfigError
from pipeline.recipe.config import as_aimed, load, to_toml
from pipeline.recipe.target import Amount, amount


@pytest.mark.parametrize(
    ("quantity", "text", "want"),
    [
        ("latency", 0.4, Amount(share=0.4)),
        ("latency", "0.4", Amount(share=0.4)),
        ("latency", "3.5ms", Amount(absolute=3.5)),
        ("latency", "900 us", Amount(absolute=0.9)),
        ("latency", "900\u00b5s", Amount(absolute=0.9)),
        ("latency", "1.5s", Amount(absolute=1500.0)),
        ("macs", "1.2G", Amount(absolute=1.2e9)),
        ("macs", "600m", Amount(absolute=6e8)),
        ("params", "5M", Amount(absolute=5e6)),
        ("size", "10MB", Amount(absolute=1e7)),
        ("size", ".5", Amount(share=0.5)),
    ],
)
def test_a_share_or_a_number_with_its_unit(quantity, text, want):
    found = amount(quantity, text)
    assert found.share == want.share
    assert found.absolute == (None if want.absolute is None else pytest.approx(want.absolute))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("0", "above 0"), (0, "above 0"), (1, "not below dense"), ("1.4", "not below dense"),
        ("-0.3", "share of dense"), ("fast", "share of dense"), ("3xs", "us, ms, s"), ("3 5ms", "share of dense"),
        ("nan", "share of dense"),
        ("inf", "share of dense"), ("1e999", "above 0"), ("0ms", "above 0"), (True, "true or false"),
        ("", "share of dense"),
    ],
)  # fmt: skip
def test_anything_else_is_refused_with_the_key(value, words):
    with pytest.raises(ConfigError) as caught:
        load(settings={"model": "resnet18", "prune.target.latency": value})
    assert words in caught.value.message and "prune.target" in caught.value.message


def test_the_latency_is_that_of_the_gate_unless_the_target_says_otherwise():
    made = load(
        settings={
            "prune.target.latency": 0.4,
            "gate.threads": 4,
            "gate.batch_size": 8,
            "optimize.int8": True,
            "export.opset": 20,
        }
    )
    target = made.prune.target
    assert (target.threads, target.batch_sizes, target.int8, target.opset) == ((4,), (8,), True, 20)
    own = load(settings={"prune.target": {"latency": 0.4, "threads": [1, 2], "int8": False}, "gate.threads": 4})
    assert (own.prune.target.threads, own.prune.target.int8) == ((1, 2), False)


def test_a_latency_that_was_asked_for_is_measured_for_longer_unless_the_recipe_says_how_long():
    usual = load(settings={"prune.target.macs": 0.4}).gate.seconds
    assert load(settings={"prune.target.latency": 0.4}).gate.seconds >= 3 * usual
    assert load(settings={"prune.target": {"latency": 0.4, "device": "d.json"}}).gate.seconds == usual
    assert load(settings={"prune.target.latency": 0.4, "gate.seconds": usual}).gate.seconds == usual


def test_with_a_target_the_widths_follow_measured_curves_unless_a_scope_is_named():
    assert load(settings={"prune.target.macs": 0.4}).prune.scope == "curves"
    assert load(settings={"prune.target.macs": 0.4}).prune.criterion == "elimination"
    assert load(settings={"prune.target.macs": 0.4, "prune.scope": "layer"}).prune.scope == "layer"
    assert load(settings={"model": "resnet18"}).prune.scope == "layer"


def test_a_size_is_that_of_the_file_that_ships():
    assert load(settings={"prune.target.size": 0.2, "optimize.int8": True}).prune.target.int8 is True
    assert load(settings={"prune.target.size": 0.2}).prune.target.int8 is False
    assert load(settings={"prune.target.size": 0.2, "gate.threads": 4}).prune.target.threads == ()
    with pytest.raises(ConfigError, match="no such file is made"):
        load(settings={"prune.target.size": 0.2, "prune.target.int8": True})


@pytest.mark.parametrize(
    ("settings", "judged", "warned"),
    [
        ({"prune.target.threads": [4]}, (4, 1), True),  # the gate names none: it judges what was asked for
        ({"prune.target.threads": [4, 1]}, (4, 1), True),
        ({"prune.target.threads": [4, 1], "gate.threads": 1}, (1, 1), True),
        ({"prune.target.threads": [4], "gate.threads": 1}, (1, 1), False),  # which says nothing of four threads
        ({"prune.target.batch_sizes": [8], "gate.batch_size": 2}, (1, 2), False),
        ({"prune.target.batch_sizes": [8]}, (1, 8), True),
        ({"prune.target.int8": False, "optimize.int8": True}, (1, 1), False),
    ],
)
def test_the_gate_warns_of_the_setting_that_was_asked_for_and_of_no_other(settings, judged, warned):
    made = load(settings={"prune.target.latency": "3.5ms", **settings})
    assert (made.gate.threads, made.gate.batch_size) == judged
    assert [limit.metric for limit in made.gate.limits] == (["latency"] if warned else [])


def test_a_table_is_of_what_a_target_lets_go():
    """Where a latency is asked for, curves decide, and streams may go: a table without a target is to serve that."""
    plain, aimed = load(settings={"model": "m", "seed": 3}), load(settings={"model": "m", "prune.target.latency": 0.3})
    read = as_aimed(plain)
    assert read.prune.target.amounts == {}
    assert (read.prune.scope, read.prune.groups) == (aimed.prune.scope, aimed.prune.groups)
    assert read.prune.groups.residual
    assert read.prune.seed == 3
    named = as_aimed(load(settings={"model": "m", "prune.scope": "layer"}))
    assert (named.prune.scope, named.prune.groups.residual) == ("layer", False)
    assert as_aimed(aimed) == aimed
    with pytest.raises(ConfigError, match="ratio is 0"):
        as_aimed(load(settings={"model": "m", "prune.ratio": 0}))


def test_a_recipe_with_a_target_reads_back_to_itself(tmp_path):
    made = load(settings={"model": "resnet18", "prune.target.latency": "3.5ms", "prune.target.size": 0.5})
    path = tmp_path / "recipe.toml"
    path.write_text(to_toml(made))
    assert load(path) == made


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prune.target.latency": 0.4, "prune.method": "unstructured"}, "removing channels"),
        ({"prune.target.macs": 0.4, "prune.method": "none"}, "removing channels"),
        ({"prune.target.macs": 0.4, "prune.ratio": 0}, "ratio is 0"),
        ({"prune.target": {"latency": 0.4, "device": "d.json", "threads": [1, 2]}}, "one of each"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, words):
    with pytest.raises(ConfigError) as caught:
        load(settings=settings)
    assert words in caught.value.message
