"""What plan says: sizes to expect, removable shares, and names that repeat said once, but exactly."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from pipeline import Config
from pipeline.channels import Blocked
from pipeline.cli import main
from pipeline.inquiry import planning
from pipeline.recipe import config

TINY = f"{Path(__file__).parents[1] / 'tiny.py'}:build"


@pytest.fixture(scope="module")
def made() -> planning.Plan:
    return planning.plan(Config(model=TINY, data={"input_size": [3, 16, 16]}, prune={"ratio": 0.5}))


def test_sizes_fall_with_the_ratio_and_the_recipes_comes_first(made):
    assert [e.ratio for e in made.expectations] == [0.5, 0.25, 0.75]
    half, quarter, three = made.expectations
    assert quarter.params > half.params > three.params
    assert quarter.macs > half.macs > three.macs
    assert half.megabytes == pytest.approx(4 * half.params / 1e6)  # float32
    assert made.megabytes == pytest.approx(4 * made.analysis.params / 1e6)
    assert (half.params, half.macs) == (made.expected.params, made.expected.macs)


def test_a_target_that_whole_branches_meet_is_planned_with_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {
        "model": f"{Path(__file__).parents[1] / 'selection' / 'test_schedules.py'}:Net", "data.input_size": [3, 8, 8],
        "prune.target.macs": 0.2, "prune.refit": False, "prune.floor": 0.4, "prune.overrides": {"stem": 0.0},
        "prune.samples": 8,
    }  # fmt: skip
    made = planning.plan(config.load(None, given))
    first = made.expectations[0]
    assert first.ratio is None
    assert first.macs <= 0.2 * made.analysis.macs
    told = made.to_json()
    assert told["branches"]
    assert all(name.startswith("blocks.") for name in told["branches"])
    assert 0 in {cluster["kept"] for cluster in told["clusters"]}


def test_shares_count_what_the_output_holds(made):
    """Only the head's rows belong to the output: its bias stays, and nothing else."""
    assert made.analysis.removable_share == pytest.approx(1 - 10 / made.analysis.params)
    assert made.analysis.removable_macs_share == 1.0


def test_the_outline_holds_every_cluster_once(made):
    lines = [line for found in planning.outline(made).values() for line in found]
    assert sum(line.count for line in lines) == len(made.analysis.clusters)
    repeated = next(line for line in lines if line.name == "blocks.{0,2}.conv1")
    assert (repeated.count, repeated.cluster.size, repeated.kept) == (2, 32, 16)
    assert repeated.ties == "blocks.{0,2}.bn1, blocks.{0,2}.conv2"


def test_what_stays_is_merged_by_reason():
    blocked = [Blocked("amax", "amax", "reduced over", 5), Blocked("amax", "amax_1", "reduced over", 7)]
    assert planning.kept_whole([*blocked, Blocked("cat", "cat", "other", 9)]) == [
        ("amax: reduced over", "amax", 2, 12), ("cat: other", "cat", 1, 9),
    ]  # fmt: skip


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 12)), min_size=1, max_size=20, unique=True))
def test_names_said_together_say_exactly_the_names(places):
    names = [f"block{a}.layer{b}.conv" for a, b in places]
    said = [name for line, members in planning.together(names) for name in spelt_out(line) if members]
    assert sorted(said) == sorted(names)


def spelt_out(line: str) -> list[str]:
    found = re.search(r"\{([^}]*)\}", line)
    if found is None:
        return [line]
    numbers = []
    for part in found[1].split(","):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return [name for n in numbers for name in spelt_out(line[: found.start()] + str(n) + line[found.end() :])]


def test_the_command_prints_a_tree_and_draws(tmp_path):
    drawing = tmp_path / "widths.svg"
    words = ["plan", TINY, "--input-size", "3,16,16", "--out", str(tmp_path / "none"), "--svg", str(drawing)]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    for said in ("blocks.{0,2}.conv1", "32 -> 16", "x 2", "stays", "an output of the model", "expected size", "0.75"):
        assert said in done.output
    assert drawing.read_text().startswith("<svg")
    assert not (tmp_path / "none").exists()
    nowhere = CliRunner().invoke(main, [*words[:-1], str(tmp_path / "missing" / "widths.svg")])
    assert nowhere.exit_code == 2
    assert "cannot be written" in nowhere.output
