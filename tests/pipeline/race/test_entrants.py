"""Which candidates race: the recipe's words held against the table."""

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from exporters import CANDIDATES
from foundation.errors import ConfigError
from pipeline.cli import main
from pipeline.race.entrants import entrants
from pipeline.recipe import config
from pipeline.recipe.race import OptimizeSection

TINY = Path(__file__).parents[1] / "tiny.py"
DEFAULT = ["portable", "basic", "host", "opset18", "opset23", "fused", "ort-portable", "ort-host", "legacy"]
INT8 = ["int8-minmax", "int8-entropy", "int8-percentile", "int8-dynamic"]


def names(**settings):
    return [spec.name for spec in entrants(OptimizeSection(**settings))]


def test_left_out_those_that_race_by_default_and_int8_where_it_is_asked_for():
    assert names() == DEFAULT
    assert names(int8=True) == [*DEFAULT, *INT8, *(f"{name}-host" for name in INT8)]


def test_named_ones_keep_their_order_and_are_made_once():
    assert names(candidates=("opset19", "int8-minmax", "portable", "opset19")) == ["opset19", "int8-minmax", "portable"]
    assert names(candidates=tuple(CANDIDATES), int8=True) == list(CANDIDATES)


def test_an_unknown_name_is_refused_before_anything_is_built_and_the_nearest_named(tmp_path):
    with pytest.raises(ConfigError, match=r"optimize\.candidates: there is no candidate 'portabel'") as caught:
        names(candidates=("portabel",))
    assert "portable" in caught.value.hint
    setting = 'optimize.candidates=["int8-minmix"]'
    for words in (["deploy", "no-such-model"], ["plan", f"{TINY}:build", "--input-size", "3,16,16"]):
        done = CliRunner().invoke(main, [*words, "--set", setting, "--out", str(tmp_path / "out")])
        assert done.exit_code == 2
        assert "no candidate 'int8-minmix'" in done.output
        assert "Did you mean int8-minmax" in done.output
    assert not (tmp_path / "out").exists()


def test_none_at_all_is_refused():
    with pytest.raises(ConfigError, match=r"optimize\.candidates"):
        config.load(None, {"optimize.candidates": []})


def test_the_table_costs_no_heavy_import():
    code = (
        "import sys; import exporters.candidates;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'onnx', 'onnxruntime', 'scipy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
