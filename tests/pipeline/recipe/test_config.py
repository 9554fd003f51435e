"""Recipes: what is refused and how it is said, and that a recipe survives being written out."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foundation.errors import ConfigError
from pipeline.recipe import config
from pipeline.recipe.config import Config
from pipeline.recipe.removal import GroupSwitches


def recipe(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


def test_a_recipe_and_settings_are_laid_over_the_defaults(tmp_path):
    made = config.load(recipe(tmp_path, "[prune]\nratio = 0.3\nnorm = 'l1'\n"), {"prune.ratio": 0.4})
    assert (made.prune.ratio, made.prune.criterion, made.prune.method) == (0.4, "l1", "structured")


@pytest.mark.parametrize(
    ("text", "key", "near"),
    [
        ("[prune]\nration = 0.5\n", "prune.ration", "ratio"),
        ("[prunes]\nratio = 0.5\n", "prunes", "prune"),
        ("[gate]\nmax_latency = 0.5\n", "gate.max_latency", "max_latency_ratio"),
        ("[baseline.train]\nepoch = 3\n", "baseline.train.epoch", "epochs"),
        ("[prune.groups]\nhead = true\n", "prune.groups.head", "heads"),
    ],
)
def test_an_unknown_key_is_refused_and_the_nearest_named(tmp_path, text, key, near):
    with pytest.raises(ConfigError) as caught:
        config.load(recipe(tmp_path, text))
    assert repr(key) in caught.value.message
    assert near in caught.value.hint


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan")])
def test_a_ratio_outside_0_1_is_refused(ratio):
    with pytest.raises(ConfigError, match="prune.ratio"):
        config.load(None, {"prune.ratio": ratio})


def test_an_override_ratio_outside_0_1_is_refused():
    with pytest.raises(ConfigError, match="conv1"):
        config.load(None, {"prune.overrides": {"conv1": 1.0}})


def test_the_top_level_seed_reaches_every_section_that_sets_none():
    made = config.load(None, {"seed": 7, "prune.seed": 1})
    assert (made.baseline.seed, made.finetune.seed, made.prune.seed) == (7, 7, 1)


def test_broken_toml_and_a_missing_file_are_one_line(tmp_path):
    for path in (recipe(tmp_path, "ratio = ="), tmp_path / "none.toml"):
        with pytest.raises(ConfigError) as caught:
            config.load(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a/b", "..", ".x", "", "a\\b"])
def test_a_name_cannot_leave_the_artifacts_folder(name):
    with pytest.raises(ConfigError, match="name"):
        config.load(None, {"name": name})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prune.ratio=0.3", ("prune.ratio", 0.3)),
        ("data.input_size=[3,64,64]", ("data.input_size", [3, 64, 64])),
        ("prune.norm=l1", ("prune.norm", "l1")),
        ("prune.groups.residual=true", ("prune.groups.residual", True)),
    ],
)
def test_set_reads_values_as_toml_and_words_as_text(text, expected):
    assert config.parse_setting(text) == expected


def test_set_without_an_equals_sign_is_refused():
    with pytest.raises(ConfigError, match="key=value"):
        config.parse_setting("prune.ratio")


@given(ratio=st.floats(0, 0.99), seed=st.integers(0, 2**31), glob=st.text("abc.*", min_size=1))
def test_a_recipe_written_out_reads_back_to_the_same_value(tmp_path_factory, ratio, seed, glob):
    made = config.load(None, {"prune.ratio": ratio, "seed": seed, "prune.overrides": {glob: ratio}})
    path = tmp_path_factory.mktemp("recipe") / "config.toml"
    path.write_text(config.to_toml(made))
    assert config.load(path) == made
    assert isinstance(made, Config)


def test_only_the_training_settings_that_were_set_are_written_out(tmp_path):
    made = config.load(None, {"baseline.train.epochs": 3})
    assert made.baseline.train is not None
    assert made.baseline.train.model_fields_set == {"epochs"}
    text = config.to_toml(made)
    assert "[baseline.train]\nepochs = 3\n" in text
    again = config.load(recipe(tmp_path, text))
    assert again.baseline.train is not None
    assert again.baseline.train.model_fields_set == {"epochs"}


@pytest.mark.parametrize(
    ("settings", "scope", "criterion", "seconds"),
    [
        ({}, "layer", "l2", None),
        ({"finetune.recover": "train"}, "layer", "l2", None),
        ({"finetune.recover": "closed-form"}, "curves", "elimination", 300.0),
        ({"finetune.recover": "closed-form", "prune.seconds": 5.0}, "curves", "elimination", 5.0),
        ({"finetune.recover": "closed-form", "prune.criterion": "l1"}, "curves", "l1", 300.0),
        ({"finetune.recover": "closed-form", "prune.norm": "l1"}, "curves", "l1", 300.0),
        ({"finetune.recover": "closed-form", "prune.scope": "layer"}, "layer", "l2", None),
        ({"finetune.recover": "closed-form", "prune.method": "2:4"}, "layer", "l2", None),
    ],
)
def test_where_nothing_is_trained_curves_choose_unless_a_scope_is_named(settings, scope, criterion, seconds, tmp_path):
    made = config.load(None, settings)
    assert (made.prune.scope, made.prune.criterion, made.prune.seconds) == (scope, criterion, seconds)
    assert made.prune.groups.residual == (scope == "curves")
    path = tmp_path / "again.toml"
    path.write_text(config.to_toml(made))
    assert config.load(path) == made


@pytest.mark.parametrize("settings", [{"finetune.recover": "closed-form"}, {"prune.scope": "curves"}])
def test_a_recipe_that_keeps_residual_streams_keeps_them_where_curves_choose(settings, tmp_path):
    made = config.load(None, settings | {"prune.groups.residual": False})
    assert (made.prune.scope, made.prune.groups.residual) == ("curves", False)
    path = tmp_path / "again.toml"
    path.write_text(config.to_toml(made))
    assert config.load(path) == made
    assert config.load(None, settings | {"prune.groups.heads": False}).prune.groups == GroupSwitches(
        heads=False, residual=True
    )


def test_streams_stay_where_the_recipe_names_curves_and_nothing_is_chosen():
    assert not config.load(None, {"prune.scope": "curves", "prune.method": "none"}).prune.groups.residual


@pytest.mark.parametrize("groups", ["heads", 3, None, [True]])
def test_groups_that_are_no_table_are_refused_where_curves_choose(groups):
    with pytest.raises(ConfigError, match="prune.groups"):
        config.load(None, {"prune.scope": "curves", "prune.groups": groups})
