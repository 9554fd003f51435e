"""The race of stage 6, with faults planted: what is wrong must never ship."""

import copy
import json
import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from exporters import candidates, describe, host, session_of, to_onnx
from foundation.files import save_tensors
from pipeline import data, models
from pipeline.artifacts import Baseline, Exported, Optimized, Pruned, Shrunk, archive
from pipeline.progress import Progress
from pipeline.race import budgets, timing
from pipeline.recipe.race import OptimizeSection
from pipeline.stages import s6_optimize
from pipeline.tasks import classification
from validators import LatencyReport, Measured, OrtRunner, RunnerLatency

TASK = classification.task("classification", "output")

SIZE = (3, 8, 8)


class Net(nn.Module):
    """Three convolutions and a classifier; untrained."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.body = nn.Conv2d(16, 16, 3, padding=1)
        self.tail = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = self.tail(self.body(self.stem(x).relu()).relu()).relu()
        return self.head(x.mean((2, 3)))


class Overflowing(Net):
    """The same function, in numbers that overflow once onnxruntime has put the product into the convolution."""

    def __init__(self):
        super().__init__()
        self.stem.weight.data *= 1e20
        self.stem.bias.data *= 0
        self.register_buffer("huge", torch.full((1, 16, 1, 1), 1e20))

    def forward(self, x):
        x = self.stem(x * 1e-20) * self.huge / 1e20
        return self.head(self.tail(self.body(x.relu()).relu()).relu().mean((2, 3)))


class Race:
    """Stage 6 alone, on an untrained net; `dense` makes of it the dense one, whose answers are the labels."""

    def __init__(self, folder, make=Net, change=lambda net: None, dense=None):
        torch.manual_seed(0)
        self.net = make().eval()
        with torch.no_grad():
            change(self.net)
            digits = data.load("digits", input_size=SIZE)
            images = torch.cat([x for (x,), _ in digits.batches("calibration")])
            self.net.head.bias -= self.net(images).mean(0)  # so that every class is predicted
            self.images, whole = images, copy.deepcopy(self.net)
            if dense:
                dense(whole)
            labels = whole(images).argmax(1)
        self.folder = folder
        self.source = models.load(self.net, num_classes=10, input_size=SIZE)
        self.data = replace(digits, calibration=replace(digits.calibration, labels=labels))
        x = torch.randn(2, *SIZE)
        program = torch.export.export(self.net, (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
        for name in ("0-baseline", "4-shrink", "5-export", "6-optimize"):
            (folder / name).mkdir()
        archive.write(program, folder / "4-shrink" / "shrunk.pt2")
        to_onnx(program, folder / "5-export" / "model.onnx", example=(x,), opset=20, metadata={"parent": "abc"})
        if dense:
            to_onnx(whole, folder / "0-baseline" / "dense.onnx", example=(x,), opset=20, metadata={})
        else:
            shutil.copy(folder / "5-export" / "model.onnx", folder / "0-baseline" / "dense.onnx")
        save_tensors(whole.state_dict(), folder / "0-baseline" / Baseline.WEIGHTS)
        self.exported = folder / "5-export" / "model.onnx"

    def run(self, *names, removed=True, progress=None, **settings) -> Optimized:
        made = s6_optimize.run(
            OptimizeSection(candidates=names, seconds=0.05, **settings),
            self.folder / "6-optimize",
            self.source,
            self.data,
            Baseline.model_construct(folder=self.folder / "0-baseline"),
            Pruned.model_construct(zeros=10),
            Shrunk.model_construct(folder=self.folder / "4-shrink", removed=removed),
            Exported.model_construct(folder=self.folder / "5-export"),
            TASK,
            progress or Progress(),
        ).save()
        assert Optimized.load(made.folder) == made
        return made

    def answers(self):
        with torch.no_grad():
            return self.net(self.images).argmax(1)

    def answers_match(self, made: Optimized, atol=1e-4):
        x = torch.randn(4, *SIZE)
        found = OrtRunner(made.onnx, threads=1, session=made.winner.session).infer({"input": x.numpy()})
        np.testing.assert_allclose(found["output"], self.net(x).detach(), rtol=0, atol=atol)


def rows(made):
    return {row.name: row for row in made.candidates}


def times(monkeypatch, **milliseconds):
    """Times as data: the race gives these medians, each with an interval of 4 %, whatever the machine does."""

    def race(runners, feed, *, reference, seconds, seed):
        base = milliseconds[reference.replace("-", "_")]
        found = {}
        for name, runner in runners.items():
            runner.infer(feed.arrays)
            median = milliseconds[name.replace("-", "_")]
            ratio = Measured(value=median / base, low=0.98 * median / base, high=1.02 * median / base)
            found[name] = RunnerLatency.model_construct(threads=runner.threads, median_ms=median, ratio=ratio)
        return LatencyReport.model_construct(reference=reference, runners=found)

    monkeypatch.setattr(timing, "race", race)


def test_what_passed_is_timed_and_the_winner_and_its_reasons_are_written(tmp_path):
    race = Race(tmp_path)
    made = race.run("portable", "host", "opset23", "ort-portable", "fused", threads=(1, 2), batch_sizes=(1, 2))
    table = rows(made)
    assert table["fused"].outcome == "skipped"
    for name in ("portable", "host", "opset23", "ort-portable"):
        row = table[name]
        assert row.outcome == "passed", row.reason
        assert [(t.threads, t.batch_size) for t in row.latencies] == [(1, 1), (1, 2), (2, 1), (2, 2)]
        assert min(row.bytes, row.load_ms, row.peak_rss) > 0
        assert row.max_scaled <= row.allowed == 1e-5
    assert made.shipped in ("portable", "opset23")  # host is this CPU's, and .ort was not asked for
    assert made.why.startswith(f"{made.shipped} ships: ")
    timed = {name: [t.ratio for t in table[name].latencies] for name in ("portable", "host", "opset23", "ort-portable")}
    for name in ("host", "ort-portable"):  # either may be the faster one here
        faster = np.prod(timed[name]) < np.prod(timed[made.shipped])
        assert ("does not ship: " in table[name].reason) == faster
    assert any("portable .ort file takes" in statement for statement in made.statements)
    race.answers_match(made)
    assert json.loads((made.folder / "candidates.json").read_text())["shipped"] == made.shipped
    assert "<svg" in (made.folder / "candidates.svg").read_text()
    kept = {row.file for row in made.candidates if row.file}
    assert {p.name for p in made.folder.glob("model.*") if "required" not in p.name} == kept
    assert {table["portable"].file, table["host"].file, table["ort-portable"].file} <= kept


def plant(monkeypatch, name, fault):
    """Make a candidate smaller and faster than any other: it has no convolution at all."""

    def wrong(source, path):
        made = onnx.parser.parse_model(
            f"""<ir_version: 9, opset_import: ["" : 18]>
            g (float[n, 3, 8, 8] input) => (float[n, 10] output) {{
                flat = Flatten (input)
                cut = Slice (flat, zero, ten, one)
                output = {"Mul (cut, nan)" if fault == "not a number" else "Relu (cut)"}
            }}"""
        )
        values = {"zero": np.array([0]), "ten": np.array([10]), "one": np.array([1]), "nan": np.float32("nan")}
        made.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in values.items())
        if fault == "nothing":
            path.write_bytes(b"")
        else:
            onnx.save(made, path)
        return candidates.Built("a fault")

    budget = "accuracy" if fault == "not a number" else "rounding"
    monkeypatch.setitem(candidates.CANDIDATES, name, candidates.CandidateSpec(name, wrong, budget=budget))


@pytest.mark.parametrize("fault", ["another function", "nothing", "not a number"])
def test_a_candidate_that_is_wrong_never_ships_however_fast_or_small(tmp_path, monkeypatch, fault):
    plant(monkeypatch, "basic", fault)
    made = Race(tmp_path).run("basic", "portable", prefer="size")
    assert rows(made)["basic"].outcome == "failed"
    assert rows(made)["basic"].reason
    assert not rows(made)["basic"].latencies
    assert made.shipped == "portable"
    assert not (made.folder / "model.basic.onnx").exists()


def test_when_nothing_is_proven_the_first_goes_on_marked_as_unproven_and_never_one_that_may_not_ship(
    tmp_path, monkeypatch
):
    plant(monkeypatch, "portable", "another function")
    made = Race(tmp_path).run("host", "portable")
    assert rows(made)["host"].outcome == "passed"
    assert not made.proven
    assert made.shipped == "portable"
    assert "unproven" in made.why
    assert made.onnx.is_file()


@pytest.mark.slow
def test_an_optimiser_that_breaks_the_model_is_named_and_every_level_ships_without_it(tmp_path):
    race = Race(tmp_path, Overflowing)
    made = race.run("portable", "host", "basic")
    for row in made.candidates:
        assert row.outcome == "passed", row.reason
        assert row.session == {"optimization.disable_specified_optimizers": "ConvMulFusion"}
        assert any("made without ConvMulFusion" in note for note in row.notes)
        assert row.peak_rss > 0
        assert (
            not row.file or session_of(made.folder / row.file) == row.session
        )  # so that `check` and `gate` load it as the race did
    assert any("ConvMulFusion breaks this model" in statement for statement in made.statements)
    race.answers_match(made)
    plain = OrtRunner(race.exported, threads=1).infer({"input": np.ones((1, *SIZE), np.float32)})["output"]
    assert not np.isfinite(plain).all()  # the fault is real


def outlier(net):
    """One channel so large that the seven bits of the others' common activation range are gone."""
    net.body.weight[0] *= 3000
    net.tail.weight[:, 0] /= 3000


def test_int8_that_costs_too_much_keeps_its_worst_nodes_in_float_until_the_budget_holds(tmp_path, monkeypatch):
    race = Race(tmp_path, change=outlier)
    with monkeypatch.context() as patch:
        patch.setattr(budgets.AccuracyBudget, "repair", lambda self, row, remake, progress: row)
        row = rows(race.run("portable", "int8-minmax", max_score_lost=25.0))["int8-minmax"]
    assert row.outcome == "failed"
    assert "points of accuracy against the shrunk model, 25 allowed" in row.reason
    row = rows(race.run("portable", "int8-minmax", max_score_lost=25.0))["int8-minmax"]
    assert row.outcome == "passed", row.reason
    assert row.score_lost <= row.allowed == 25.0
    assert any("in float for accuracy" in note for note in row.notes)
    assert row.operators["DequantizeLinear"] > 0


def test_what_pruning_lost_is_gone_from_the_budget_of_int8(tmp_path):
    def dense(net):
        net.head.bias[0] += 0.02

    race = Race(tmp_path, dense=dense)
    lost = 100 * float((race.answers() != race.data.calibration.labels).float().mean())
    assert lost > 5
    row = rows(race.run("portable", "int8-minmax", max_score_lost=lost - 2))["int8-minmax"]
    assert row.outcome == "failed"
    assert "points of accuracy against the dense model" in row.reason
    assert row.score_lost < lost - 2 < row.score_lost_dense
    row = rows(race.run("portable", "int8-minmax", max_score_lost=lost + 3))["int8-minmax"]
    assert row.outcome == "passed", row.reason


def test_int8_that_keeps_within_its_budget_is_judged_by_accuracy_and_not_by_rounding(tmp_path, monkeypatch):
    times(monkeypatch, portable=1.0, int8_minmax=0.5)
    made = Race(tmp_path).run("portable", "int8-minmax", max_score_lost=50.0)
    row = rows(made)["int8-minmax"]
    assert row.outcome == "passed", row.reason
    assert (row.budget, row.reduced_precision) == ("accuracy", True)
    assert row.max_scaled > 1e-5
    assert row.allowed == 50.0
    assert made.shipped == "int8-minmax"
    assert made.why == "int8-minmax ships: 0.5 ms, 0.500 of portable, the fastest of 2 that may ship."


@pytest.mark.parametrize("ship", ["portable", "host"])
@pytest.mark.parametrize("vnni", [True, False])
def test_int8_ships_for_any_machine_and_what_is_faster_here_alone_says_why_it_does_not(
    tmp_path, monkeypatch, vnni, ship
):
    monkeypatch.setattr(host, "has_vnni", lambda: vnni)
    times(
        monkeypatch, portable=1.0, int8_minmax=0.6, int8_entropy=0.61, int8_percentile=0.62, int8_dynamic=0.9,
        int8_minmax_host=0.5, int8_entropy_host=0.52, int8_percentile_host=0.53, int8_dynamic_host=0.9,
    )  # fmt: skip
    said = []

    class Terminal(Progress):
        def say(self, text):
            said.append(" ".join(text.split()))

    made = Race(tmp_path).run("portable", int8=True, ship=ship, max_score_lost=50.0, progress=Terminal())
    table = rows(made)
    assert {row.outcome for name, row in table.items() if name.endswith("-host")} == {"passed" if vnni else "skipped"}
    assert (made.shipped.endswith("-host"), made.shipped.startswith("int8-")) == (vnni and ship == "host", True)
    faster = [row for row in table.values() if row.outcome == "passed" and not row.portable]
    if vnni and ship == "portable":
        why = 'does not ship: belongs to this CPU only; optimize.ship = "host" lets it ship'
        assert table["int8-minmax-host"].reason == why
        assert any(line.startswith("int8-minmax-host passed 0.5 ms") and line.endswith(why) for line in said)
        assert all(row.reason == why for row in faster if row.latencies[0].median_ms < 0.6)
    else:
        assert not any("this CPU only" in row.reason for row in faster)


def test_float16_races_where_it_is_named_and_is_judged_by_accuracy(tmp_path, monkeypatch):
    times(monkeypatch, portable=1.0, fp16=0.7)
    made = Race(tmp_path).run("portable", "fp16")
    row = rows(made)["fp16"]
    assert row.outcome == "passed", row.reason
    assert (row.budget, row.portable, made.shipped) == ("accuracy", True, "fp16")
    assert row.max_scaled > 1e-5
    assert row.score_lost <= row.allowed == 1.0
    assert row.bytes < rows(made)["portable"].bytes


def test_float16_that_overflows_never_ships(tmp_path, monkeypatch):
    """Activations of 1e5 are infinite in float16, which ends at 65,504."""

    def large(net):
        net.body.weight *= 1e6
        net.tail.weight /= 1e6

    times(monkeypatch, portable=1.0, fp16=0.1)
    made = Race(tmp_path, change=large).run("portable", "fp16", prefer="size")
    assert rows(made)["fp16"].outcome == "failed"
    assert rows(made)["fp16"].reason
    assert made.shipped == "portable"


def denormal(net):
    net.body.weight[0, :8] = 1e-40


def test_denormals_are_flushed_before_anything_is_made_and_the_effect_is_said(tmp_path):
    race = Race(tmp_path, change=denormal)
    made = race.run("portable", "opset18")
    assert made.statements[0].startswith("72 of ")
    assert "72 were set to zero" in made.statements[0]
    for row in made.candidates:
        assert (row.outcome, row.denormals) == ("passed", 0)
    weights = [onnx.numpy_helper.to_array(t) for t in onnx.load(made.onnx).graph.initializer]
    assert not any(((w != 0) & (np.abs(w) < 1e-38)).any() for w in weights if w.dtype == np.float32)
    race.answers_match(made)
    assert not list(made.folder.glob(".*"))


def test_zeros_without_structure_are_said_to_buy_no_time_and_are_compressed(tmp_path):
    def sparse(net):
        net.body.weight[torch.rand_like(net.body.weight) < 0.9] = 0

    made = Race(tmp_path, change=sparse).run("portable", removed=False)
    assert 0 < made.winner.zstd_bytes < made.winner.bytes
    assert any("zeros buy no CPU time" in statement for statement in made.statements)
    assert describe(made.onnx).metadata["parent"] == "abc"


def beside(runner, error):
    """A runner whose answers are off by `error`, as another runtime's functions make them."""
    honest = runner.infer

    def infer(feed):
        return {name: value + np.float32(error) for name, value in honest(feed).items()}

    runner.infer = infer
    return runner


@pytest.mark.parametrize(("dense_error", "outcome"), [(2e-4, "passed"), (1e-5, "failed"), (0.0, "failed")])
def test_a_candidate_may_differ_as_the_dense_model_itself_does_between_the_two_runtimes(
    tmp_path, monkeypatch, dense_error, outcome
):
    """onnxruntime is off by more than the limit, as data: a faithful candidate passes where the dense model is too."""
    real = OrtRunner

    def ort_runner(path, **options):
        return beside(real(path, **options), dense_error if path.name == "dense.onnx" else 2.5e-4)

    for module in ("context", "proof"):
        monkeypatch.setattr(f"pipeline.race.{module}.OrtRunner", ort_runner)
    monkeypatch.setattr(budgets.RoundingBudget, "repair", lambda self, row, remake, progress: row)
    made = Race(tmp_path).run("portable", parity=1e-5)
    row = made.winner
    assert row.outcome == outcome
    assert row.max_scaled > 1e-4
    if outcome == "passed":
        assert any("the dense model itself differs by" in note for note in row.notes)
    else:
        assert "not the same function" in row.reason
        assert not row.notes
