"""How a failed candidate is repaired, with the proof given as data: no model is made or run."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from exporters import ExportError, Source
from pipeline.artifacts import Candidate
from pipeline.progress import Progress
from pipeline.race import budgets
from pipeline.race.budgets import AccuracyBudget, RoundingBudget
from pipeline.recipe.race import OptimizeSection

CULPRIT = "ConvMulFusion"
ENTRY = "optimization.disable_specified_optimizers"


@dataclass
class World:
    """A model that one optimiser breaks, and int8 that is right once so many of its worst nodes are in float."""

    needed: int = 3
    made: list[tuple[tuple[str, ...], tuple[str, ...], dict[str, str]]] = field(default_factory=list)

    def __post_init__(self):
        self.cfg = OptimizeSection()
        source = Source(Path("m.onnx"), None, (), lambda: [], Path())
        self.context = SimpleNamespace(cfg=self.cfg, source=source, parity=self.parity)

    @staticmethod
    def parity(session):
        return SimpleNamespace(passed=CULPRIT in session.get(ENTRY, "").split(";"))

    def row(self, name, right=False, suffix=".onnx", **known):
        return Candidate(
            name=name, outcome="passed" if right else "failed", reason="" if right else "not the same function",
            file=f"model.{name}{suffix}", **known,
        )  # fmt: skip

    def remaker(self, name, suffix=".onnx"):
        def remake(source, session):
            self.made.append((source.disabled, source.exclude, dict(session)))
            return self.row(name, CULPRIT in source.disabled or len(source.exclude) >= self.needed, suffix)

        return remake


@pytest.fixture
def world(monkeypatch):
    monkeypatch.setattr(budgets, "OrtRunner", lambda path, threads, session: session)
    return World()


def test_the_optimiser_that_breaks_a_level_is_found_by_making_it_without(world):
    budget = RoundingBudget(world.context)
    row = budget.repair(world.row("portable"), world.remaker("portable"), Progress())
    assert row.outcome == "passed"
    assert budget.guilty == {"portable": (CULPRIT,)}
    assert world.made[-1] == ((CULPRIT,), (), {ENTRY: CULPRIT})
    assert "made without ConvMulFusion" in row.notes[-1]


def test_what_onnxruntime_did_not_make_is_made_once_and_only_loaded_without(world):
    budget = RoundingBudget(world.context)
    assert budget.repair(world.row("opset18"), world.remaker("opset18"), Progress()).outcome == "passed"
    assert world.made == [((CULPRIT,), (), {ENTRY: CULPRIT})]


def test_what_broke_one_candidate_is_the_first_suspect_for_the_next(world, monkeypatch):
    budget = RoundingBudget(world.context)
    budget.repair(world.row("portable"), world.remaker("portable"), Progress())
    monkeypatch.setattr(budgets, "guilty_optimizers", lambda holds: pytest.fail("looked for again"))
    row = budget.repair(world.row("ort-portable", suffix=".ort"), world.remaker("ort-portable", ".ort"), Progress())
    assert row.outcome == "passed"
    assert world.made[-1] == ((CULPRIT,), (), {})  # a .ort file is not optimised again when it is loaded
    assert budget.guilty == dict.fromkeys(("portable", "ort-portable"), (CULPRIT,))


def test_where_no_optimiser_is_to_blame_the_row_stays_as_it_was(world, monkeypatch):
    monkeypatch.setattr(budgets, "guilty_optimizers", lambda holds: None)
    budget, row = RoundingBudget(world.context), world.row("portable")
    assert budget.repair(row, world.remaker("portable"), Progress()) is row
    assert budget.guilty == {}


@pytest.mark.parametrize(
    ("needed", "tried", "outcome"), [(1, [1], "passed"), (3, [1, 2, 4], "passed"), (9, [1, 2, 4], "failed")]
)
def test_twice_as_many_nodes_stay_in_float_each_time_and_the_ranking_is_made_once(
    world, monkeypatch, needed, tried, outcome
):
    world.needed, ranked = needed, []
    world.context.data = SimpleNamespace(arrays=lambda part, count: {})
    ranking = dict.fromkeys("abcdef", 0.0)
    monkeypatch.setattr(budgets, "sensitivity", lambda *args, **options: ranked.append(1) or ranking)
    budget = AccuracyBudget(world.context)
    for name in ("int8-minmax", "int8-entropy"):
        row = world.row(name, budget="accuracy", score_lost=9.0)
        assert budget.repair(row, world.remaker(name), Progress()).outcome == outcome
    assert [len(exclude) for _, exclude, _ in world.made] == [*tried, *tried]
    assert world.made[0][1] == ("a",)
    assert ranked == [1]


def test_reduced_precision_without_comparable_outputs_is_beyond_repair(world):
    row = world.row("int8-minmax", budget="accuracy")
    assert AccuracyBudget(world.context).repair(row, lambda source, session: pytest.fail("made"), Progress()) is row


def test_where_nothing_is_left_to_quantise_the_row_stays_as_it_was(world, monkeypatch):
    def remake(source, session):
        raise ExportError("Nothing in m.onnx can be quantised.")

    monkeypatch.setattr(AccuracyBudget, "_worst_nodes", ["a", "b"])
    row = world.row("int8-minmax", budget="accuracy", score_lost=9.0)
    assert AccuracyBudget(world.context).repair(row, remake, Progress()) is row
