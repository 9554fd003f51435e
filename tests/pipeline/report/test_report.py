"""Reports: every figure is there, text stays text, nothing is fetched, and the page fits narrow and wide windows."""

import html
import json
import math
import re
import shutil
import subprocess
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.artifacts.base import Artifact, WidthChange
from pipeline.artifacts.eager import Baseline, Finetuned, Folded, Pruned, Sparsity
from pipeline.artifacts.program import Exported, Shrunk
from pipeline.artifacts.race import Candidate, CandidateLatency, Optimized
from pipeline.artifacts.verdict import Hop, Validated
from pipeline.recipe.removal import GroupSwitches
from pipeline.release.records import FileRecord, Manifest, StageRecord
from pipeline.report import figures
from pipeline.report import pages as report
from validators import (
    AccuracyReport,
    LatencyReport,
    Limit,
    Measured,
    Ratios,
    RunnerLatency,
    Verdict,
    compare_accuracy,
    judge,
)
from validators.accuracy import ClassAccuracy

STAGES = ("0-baseline", "1-prune", "2-finetune", "3-fold", "4-shrink", "5-export", "6-optimize", "7-validate")
SHA = "d51aa91f9d23149a7b1073a0dcd793e2c44895deb2d41a816c1b250524579884"
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>&amp;\"'|`*"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1500,1000",
    "--hide-scrollbars",
    "--dump-dom",
)
PAGES = ("report.html", "report.md", "junit.xml", "verdict.json")
LIMITS = (
    Limit(metric="accuracy drop, points", operator="<=", value=1.0),
    Limit(metric="latency, of dense", operator="<=", value=0.3),
    Limit(metric="session load, of dense", operator="<=", value=1.0, level="warn"),
)
MET = {
    "accuracy drop, points": 0.56,
    "latency, of dense": Measured(value=0.283, low=0.276, high=0.291),
    "session load, of dense": 0.27,
}


def judged(**changed: float | Measured | None) -> Verdict:
    names = {"accuracy": LIMITS[0].metric, "latency": LIMITS[1].metric, "load": LIMITS[2].metric}
    return judge(MET | {names[name]: value for name, value in changed.items()}, LIMITS)


def timed(milliseconds: float, ratio: float, low: float, high: float) -> CandidateLatency:
    return CandidateLatency(threads=2, batch_size=1, median_ms=milliseconds, ratio=ratio, low=low, high=high)


def times(median: float, against: dict[str, float]) -> RunnerLatency:
    """A model's latencies, skewed as real ones are."""
    known = tuple(median * (0.9 + 0.1 * (p / 50) + (p > 90) * (p - 90) / 20) for p in range(101))
    exact = Measured(value=1, low=1, high=1)
    ratios = {
        name: Ratios(
            median=Measured(value=value, low=value - 0.01, high=value + 0.01), p99=exact, cpu=exact, detectable=0.01
        )
        for name, value in against.items()
    }
    return RunnerLatency(
        threads=1, warmup=6, inferences=900, min_ms=known[0], median_ms=median, mean_ms=median, p95_ms=known[95],
        p99_ms=known[99], ratio=exact, cpu_median_ms=median, cpu_ratio=exact, percentiles_ms=known, ratios=ratios,
    )  # fmt: skip


def keep_measurements(folder: Path) -> None:
    """latency.json, accuracy.json and pictures of flipped samples, as the last stage leaves them."""
    race = LatencyReport(
        reference="dense", feed="random, batch 1", seed=0, blocks=180, timed_per_block=5, seconds=3.2,
        confidence=0.9875, cpus=(0, 1), load=(0.5, 0.6),
        runners={
            "shipped": times(1.703, {"dense": 0.283, "promoted": 0.9}),
            "promoted": times(1.9, {}),
            "dense": times(6.02, {}),
        },
    )  # fmt: skip
    (folder / "latency.json").write_text(race.model_dump_json())
    labels = tuple(i % 4 for i in range(40))
    wrong = {3, 7, 8, 21}
    reports = [
        AccuracyReport(
            runner="r", samples=40, top1=0.9, labels=labels, confidences=(0.75,) * 40,
            predictions=tuple((y + 1) % 4 if i in missed else y for i, y in enumerate(labels)),
            per_class={
                c: ClassAccuracy(samples=10, correct=10 - sum(labels[i] == c for i in missed)) for c in range(4)
            },
        )
        for missed in ({21}, wrong - {21})
    ]  # fmt: skip
    (folder / "accuracy.json").write_text(compare_accuracy(*reports, seed=0).model_dump_json())
    (folder / "flipped").mkdir(exist_ok=True)
    for sample in wrong - {8}:
        Image.fromarray(np.full((64, 64, 3), 8 * sample, np.uint8)).save(folder / "flipped" / f"{sample}.png")


def run(
    folder: Path,
    *,
    layers: int = 3,
    text: str = "",
    history: str | None = "epoch,lr,loss,calibration_score\n1,0.1,1.2,0.7\n2,0.1,0.6,0.9\n3,0.1,0.4,0.95\n",
    **changed: dict[str, object],
) -> tuple[Manifest, list[Artifact]]:
    """A whole version in memory; `text` is put into every field that a user or a model can fill."""
    names = [f"layer{i}.conv{text}" for i in range(layers)]
    widths = tuple(
        WidthChange(cluster=n, kind="channel", before=64 * (i + 1), after=24 * (i + 1), unit=1)
        for i, n in enumerate(names)
    )
    sparsity = tuple(
        Sparsity(parameter=f"{n}.weight", shape=(64, 64, 3, 3), weights=36864, zeros=9216, channels=64, channels_cut=16)
        for n in names
    )
    operators = {"Conv": 53, f"Relu{text}": 49}
    folders = [folder / stage for stage in STAGES]
    for made in folders:
        made.mkdir(parents=True, exist_ok=True)
    artifacts: list[Artifact] = [
        Baseline(
            folder=folders[0], trained_here=True, weights_origin=f"trained here on digits{text}", accuracy=0.9694,
            calibration_accuracy=0.96,
            params=23_528_522, macs=83_900_000, onnx_bytes=94_112_233, latency_ms=6.02, threads=1, isa="avx2",
            training_seconds=219.0,
        ),
        Pruned(
            folder=folders[1],
            method="structured", sparsity=0.742, zeros=17_458_163, params=23_528_522, expected_params=6_107_000,
            expected_macs=21_730_000, macs=83_900_000, groups_cut=7012, groups=14080, accuracy_after=0.1028,
            layers=sparsity, widths=widths,
            kinds=GroupSwitches(),
        ),
        Finetuned(
            folder=folders[2], epochs=3, best_epoch=2, accuracy=0.9611, calibration_accuracy=0.9583,
            training_seconds=96.2,
        ),
        Folded(
            folder=folders[3], sparsity=0.7421, zeros=17_460_000, params=23_528_522, accuracy=0.9611,
            max_abs_diff_to_masked=0.0,
        ),
        Shrunk(
            folder=folders[4],
            removed=True, statement=f"7 012 of 14 080 channels were removed.{text}", params_before=23_528_522,
            params_after=6_107_000, macs_before=83_900_000, macs_after=21_730_000, max_abs_diff=3.8e-6,
            max_abs_diff_float64=4.4e-15, output_scale=12.43, tolerance=1.2e-4, widths=widths,
            kept_back=(f"conv7: aten.view mixes channels with positions{text}",),
        ),
        Exported(
            folder=folders[5],
            opset=20, onnx_bytes=24_455_000, inputs=("input",), outputs=("logits",), external_data=False, nodes=123,
            centred_norms=0,
        ),
        Optimized(
            folder=folders[6],
            onnxruntime="1.31.1", ships="model.portable.onnx", shipped="portable", proven=True,
            why=f"portable ships: no other one is faster beyond doubt.{text}", operators_before=operators,
            statements=(f"The portable .ort file takes 1.29 times as long.{text}",), candidates=(
                Candidate(name="portable", file="model.portable.onnx", technique=f"onnxruntime EXTENDED{text}",
                          outcome="passed", max_scaled=2.5e-6, bytes=24_450_000, load_ms=57.1, peak_rss=151_000_000,
                          operators={"FusedConv": 49, "Conv": 4}, latencies=(timed(1.703, 1.0, 1.0, 1.0),)),
                Candidate(name="host", technique="onnxruntime ALL", outcome="passed", portable=False, isa="avx2",
                          bytes=24_560_000, max_scaled=2.6e-6, latencies=(timed(1.699, 0.998, 0.99, 1.006),)),
                Candidate(name="int8-minmax", technique="int8", outcome="failed", budget="accuracy", bytes=6_300_000,
                          accuracy_drop_points=2.4, accuracy_drop_points_dense=3.1,
                          reason=f"loses 2.40 points, 1 allowed{text}",
                          notes=(f"3 nodes stay in float{text}",)),
                Candidate(name="legacy", outcome="skipped", reason=f"the extra is not installed{text}"),
            ),
        ),
        Validated(
            folder=folders[7],
            verdict=judged(), hops=(
                Hop(reference="folded", candidate="shrunk", passed=True, max_abs=3.7e-6, mean_abs=4.1e-7,
                    max_rel=2.2e-5, mean_rel=1.1e-6, top1_agreement=0.9999, feeds=18, reasons=(),
                    top5_agreement=0.99, ulp_p50=3.0, ulp_p99=41.0, cosine=1 - 2.2e-13,
                    worst_feed=f"large values, batch 3{text}"),
                Hop(reference="shrunk", candidate="exported", passed=False, max_abs=None, mean_abs=None, max_rel=None,
                    mean_rel=None, top1_agreement=None, worst_feed="zeros, batch 1", feeds=18,
                    reasons=(f"output logits is not finite{text}",)),
            ),
            dense_accuracy=0.9694, accuracy=0.9638, accuracy_drop_points=0.56, accuracy_drop_low=-0.3,
            accuracy_drop_high=1.4, dense_latency_ms=6.02, latency_ms=1.703, latency_p95_ms=1.78, latency_p99_ms=2.04,
            latency_ratio=0.283, latency_ratio_low=0.276, latency_ratio_high=0.291, threads=2, dense_bytes=94_112_233,
            bytes=24_450_000, dense_load_ms=212.3, load_ms=57.1, promoted="v0002",
            notes=("the machine is busy: 20% of the time was spent waiting for the CPU",),
        ),
    ]  # fmt: skip
    keep_measurements(folders[7])
    if history is not None:
        (folder / "2-finetune" / "history.csv").write_text(history)
    records = tuple(
        StageRecord(stage=s, fingerprint=SHA, inputs={f"model{text}": SHA}, seconds=10.0 + i, metrics={},
                    files={"model.portable.onnx": FileRecord(sha256=SHA, bytes=1)} if s == "6-optimize" else {})
        for i, s in enumerate(STAGES)
    )  # fmt: skip
    manifest = Manifest(
        project="0.1.0", name="resnet50", model=f"resnet50{text}", version="v0003",
        created=datetime(2026, 7, 30, 14, 3, tzinfo=UTC),
        model_fingerprint="a1" * 32, data_fingerprint="b2" * 32, recipe="c3" * 32, stages=records,
        reused={"0-baseline": "v0001"}, files={}, tools={"onnxruntime": "1.31.1", f"torch{text}": "2.13.0"},
        host={"isa": "avx2", "cpu": f"EPYC{text}"}, git={"commit": "712ce76b0d3b", "dirty": "true"},
    )  # fmt: skip
    return manifest, [a.model_copy(update=changed.get(type(a).__name__.lower())) for a in artifacts]


def written(folder: Path, **options: object) -> dict[str, str]:
    report.write(folder, *run(folder, **options))
    return {name: (folder / name).read_text(encoding="utf-8") for name in PAGES}


class Page(HTMLParser):
    """The page's visible text, its tags in order, every attribute, and whether each tag was closed in order."""

    VOID = frozenset({"meta", "img", "link", "br", "rect", "line", "polyline", "path"})

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.inside: dict[str, int] = {}
        self._open: list[str] = []
        self._words: list[str] = []
        self.feed(source)
        self.close()
        assert not self._open, f"never closed: {self._open}"
        self.text = re.sub(r"\s+", " ", " ".join(self._words))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        for outer in self._open:
            self.inside[f"{outer} {tag}"] = self.inside.get(f"{outer} {tag}", 0) + 1
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag

    def handle_data(self, data):
        if not {"style", "title"} & set(self._open):
            self._words.append(data)


def test_the_page_shows_every_figure(tmp_path):
    text = Page(written(tmp_path)["report.html"]).text
    for shown in (
        "resnet50 v0003", "✓ Pass", "3.5× as fast as the dense model, 0.260 of its file size,",
        "0.260 of its parameters, −0.6 points of accuracy.",
        "96.4 %", "−0.6 points from 96.9 % dense", "−1.4 points to +0.3 points",
        "1.70 ms",
        "0.283 of 6.02 ms dense 95 % interval of the ratio: 0.276 to 0.291 p95", "p95 1.78 ms, p99 2.04 ms",
        "2 threads",
        "24.4 MB", "0.260 of 94.1 MB dense", "loads in 57.1 ms, dense in 212 ms",
        "6.11 M", "0.260 of 23.5 M dense", "21.7 M", "0.259 of 83.9 M dense",
        "dense 6.02 ms 9.32 ms 0.283 (0.273 to 0.293)", "promoted 1.90 ms 2.94 ms 0.900 (0.890 to 0.910)",
        "Interleaved: 180 blocks of 5 inferences in 3.2 s, each interval at 98.8 % confidence",
        "3 test samples were right before and are wrong now, 1 the other way",
        "(exact McNemar test: p = 0.625).",
        "sample 3: 3 dense 3, 75.0 % shipped 0, 75.0 %", "sample 21: 1 dense 2, 75.0 % shipped 1, 75.0 %",
        "3 10 100.0 % 80.0 % −20.0 points",
        "Note: the machine is busy", "Compared with v0002, the version that was current",
        "Accuracy drop, points ✓ pass 0.560 at most 1.00", "0.283 (0.276 to 0.291) at most 0.300",
        "layer2.conv 192 → 72 37.5 % stay", "layer0.conv.weight 25.0 % 9 216 of 36 864 weights, 16 of 64 channels",
        "17 458 163 of 23 528 522 weights to zero (74.2 %)",
        "dense 96.9 %, pruned 10.3 %, fine-tuned 96.1 %, shipped 96.4 %",
        "conv7: aten.view mixes channels",
        "3 epochs in 1 min 36 s; epoch 2 was kept", "for its 95.8 % on the calibration part",
        "Loss training, 0.400 at the end epoch kept", "Accuracy calibration, 95.0 % at the end",
        "epoch 1 epoch 3",
        "folded → shrunk ✓ pass 3.7e-06 4.1e-07 2.2e-05 1.1e-06",
        "3.00 41.0 2.2e-13 > 99.9 % 99.0 % 18 large values, batch 3",
        "shrunk → exported ✕ fail – – – – – – – – – 18 zeros, batch 1", "output logits is not finite",
        "Masked to folded: 0 at most",
        "3.8e-06 at most ( 4.4e-15 in float64), tolerance 1.2e-04 for outputs up to 12.4",
        "portable ships: no other one is faster beyond doubt.", "The portable .ort file takes 1.29 times as long.",
        "portable ✓ ships onnxruntime EXTENDED any machine 2.5e-06 1.70 ms 24.4 MB 57.1 ms 151 MB",
        "host passed onnxruntime ALL avx2 only 2.6e-06 1.70 ms 24.6 MB – –",
        "int8-minmax failed int8 any machine −2.4 points, −3.1 points from dense – 6.30 MB",
        "int8-minmax: loses 2.40 points, 1 allowed",
        "int8-minmax: 3 nodes stay in float", "legacy skipped – – – – – – –", "legacy: the extra is not installed",
        "Latency, 2 threads, batch 1", "host 1.70 ms 0.998 of portable (0.990 to 1.01)",
        "Relu 49 0", "FusedConv 0 49", "All 102 53", "0-baseline 10 s v0001", "7-validate 17 s",
        "Run for this version 1 min 38 s", f"sha256 {SHA}", "trained here on digits",
        "712ce76b0d3b , with uncommitted changes", "sha256 " + "c3" * 32, "a1" * 32, "b2" * 32, "avx2, EPYC",
        "onnxruntime 1.31.1, torch 2.13.0",
    ):  # fmt: skip
        assert re.sub(r"\s", "", shown) in re.sub(r"\s", "", text), shown


def test_what_broke_off_leaves_no_empty_card_and_no_figure_of_nothing(tmp_path):
    names = (
        "dense_accuracy", "accuracy", "accuracy_drop_points", "accuracy_drop_low", "accuracy_drop_high",
        "dense_latency_ms", "latency_ms", "latency_p95_ms", "latency_p99_ms", "latency_ratio", "latency_ratio_low",
        "latency_ratio_high", "dense_bytes", "bytes", "dense_load_ms", "load_ms",
    )  # fmt: skip
    verdict = judge(MET, LIMITS, crashed={"latency": "RuntimeError: the kernel gave up"})
    nothing = dict.fromkeys(names) | {"hops": (), "verdict": verdict}
    manifest, artifacts = run(tmp_path, validated=nothing)
    for kept in ("latency.json", "accuracy.json"):
        (tmp_path / "7-validate" / kept).unlink()
    report.write(tmp_path, manifest, artifacts)
    source = (tmp_path / "report.html").read_text()
    text = Page(source).text
    assert "✕ Fail Latency could not be measured: RuntimeError: the kernel gave up." in text
    assert "A speed that could not be measured, 0.260 of its parameters." in text
    assert "✕ Not measured." in text
    assert "None" not in text
    assert source.count('class="big"') == 2  # parameters and MACs, which are counted, not measured
    assert "| Latency | – | – | – of dense" in (tmp_path / "report.md").read_text().replace("\\", "")


def test_a_version_without_kept_measurements_shows_no_empty_plot(tmp_path):
    manifest, artifacts = run(tmp_path)
    for name in ("latency.json", "accuracy.json"):
        (tmp_path / "7-validate" / name).unlink()
    report.write(tmp_path, manifest, artifacts)
    text = Page((tmp_path / "report.html").read_text()).text
    assert "Interleaved" not in text
    assert "right before and are wrong now" not in text


def test_the_page_fetches_nothing_and_runs_nothing(tmp_path):
    source = written(tmp_path)["report.html"]
    page = Page(source)
    assert not {"script", "iframe", "object", "embed", "form", "base"} & set(page.tags)
    assert not re.search(r"https?:|@import|url\(|//[a-z]", source.lower())
    sources = [v for k, v in page.attributes if k in ("src", "href", "srcset", "action")]
    assert sources[0] == "data:,"
    assert len(sources) == 4
    assert all(source.startswith("data:image/png;base64,") for source in sources[1:])
    assert not [k for k, _ in page.attributes if k.startswith("on") or k == "style"]
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in page.attributes


def test_text_from_outside_stays_text_everywhere(tmp_path):
    plain, evil = written(tmp_path / "plain"), written(tmp_path / "evil", text=EVIL)
    harmless, page = Page(plain["report.html"]), Page(evil["report.html"])
    assert page.tags == harmless.tags
    assert [k for k, _ in page.attributes] == [k for k, _ in harmless.attributes]
    assert page.text.count(EVIL) >= 12
    assert "<script" not in evil["report.md"].replace("\\<", "")
    assert ElementTree.fromstring(evil["junit.xml"]).get("name") == f"leanort resnet50{EVIL} v0003"
    assert json.loads(evil["verdict.json"])["model"] == f"resnet50{EVIL}"


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=30))
def test_no_text_breaks_any_of_the_files(tmp_path, text):
    files = written(tmp_path, text=text)
    Page(files["report.html"])
    ElementTree.fromstring(files["junit.xml"])
    json.loads(files["verdict.json"])
    assert rows(files["report.md"]) == rows(written(tmp_path)["report.md"])


def rows(markdown: str) -> list[int]:
    """Cells of every table row; an escaped border is none."""
    return [len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in markdown.split("\n") if line.startswith("|")]


def test_the_verdict_and_its_reasons_come_before_every_figure(tmp_path):
    files = written(tmp_path, validated={"verdict": judged(accuracy=2.41, load=1.2)})
    text = Page(files["report.html"]).text
    reason = "Accuracy drop, points: 2.41, but at most 1.00 is asked for."
    warning = "Warning: Session load, of dense: 1.20, but at most 1.00 is asked for."
    assert text.index("✕ Fail") < text.index(reason) < text.index(warning) < text.index("96.4")
    for line in (reason, warning):
        assert f"- {line}\n" in files["report.md"]
    assert files["report.md"].startswith("### resnet50 v0003: fail\n")


def test_a_verdict_without_any_required_limit_gives_its_own_reason(tmp_path):
    files = written(tmp_path, validated={"verdict": judge({}, [])})
    assert "there is no required limit, so nothing was judged" in Page(files["report.html"]).text
    assert "Checks" not in files["report.md"]


def test_a_value_that_misses_its_limit_by_a_hair_does_not_look_equal_to_it(tmp_path):
    text = written(tmp_path, validated={"verdict": judged(accuracy=1.00004)})["report.md"]
    assert "Accuracy drop, points: 1.00004, but at most 1.00000 is asked for." in text


def test_what_was_not_measured_says_so(tmp_path):
    files = written(tmp_path, validated={"verdict": judged(accuracy=None)})
    assert "Accuracy drop, points was not measured (<= 1)." in Page(files["report.html"]).text


def test_a_run_that_removed_nothing_says_so_above_the_figures(tmp_path):
    statement = "Unstructured zeros leave every channel in place; no speed-up follows."
    same = (WidthChange(cluster="layer0.conv", kind="channel", before=64, after=64, unit=1),)
    files = written(
        tmp_path,
        pruned={"method": "unstructured"},
        shrunk={"removed": False, "statement": statement, "widths": same, "kept_back": (), "params_after": 23_528_522},
    )
    text = Page(files["report.html"]).text
    assert text.index("✓ Pass") < text.index(statement) < text.index("96.4")
    assert "No layer changed its width." in text
    assert f"\n> {statement}\n" in files["report.md"]
    assert "Sparsity per layer: 74.2" in files["report.md"]


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.276, 0.291, "3.5× as fast as the dense model"),
        (0.276, 1.02, "No measurable difference in speed"),
        (1.01, 1.2, "Slower than the dense model"),
    ],
)
def test_speed_is_claimed_only_where_the_interval_shows_it(tmp_path, low, high, words):
    ratios = {"latency_ratio_low": low, "latency_ratio_high": high}
    assert words in report.markdown_summary(*run(tmp_path, validated=ratios))


@pytest.mark.parametrize(
    "history",
    [
        None,
        "",
        "epoch,loss,train_score\n",
        "epoch,loss,train_score\n1,0.5,0.9\n",
        "epoch,loss\n1,nan\n2,\n3,oops\n4,inf\n",
        "loss\n1\n2\n",
        "epoch,seconds\n1,3\n2,3\n",
    ],
)
def test_a_history_without_two_points_draws_no_empty_plot(tmp_path, history):
    assert "polyline" not in Page(written(tmp_path, history=history)["report.html"]).tags


def test_curves_rise_and_fall_with_the_history_and_stay_inside_the_plot(tmp_path):
    history = "epoch,loss,train_score,calibration_score\n1,2.31,0.5,0.4\n2,,0.7,0.6\n3,0.4,0.7,0.8\n"
    page = Page(written(tmp_path, history=history)["report.html"])
    loss, training, calibration = (
        [tuple(map(float, pair.split(","))) for pair in (value or "").split()]
        for name, value in page.attributes
        if name == "points"
    )
    assert [x for x, _ in loss] == [0, 100]
    assert [x for x, _ in training] == [0, 50, 100]
    assert loss[0][1] < loss[1][1]
    assert training[0][1] > training[1][1] == training[2][1]
    # Both parts share one scale: 0.7 in training lies between 0.6 and 0.8 in calibration.
    assert calibration[1][1] > training[1][1] > calibration[2][1]
    assert all(0 <= y <= 100 for _, y in loss + training + calibration)
    assert [value for name, value in page.attributes if name == "x1"] == ["50.0", "50.0"]  # epoch 2 was kept


def test_bars_are_as_long_as_what_they_stand_for(tmp_path):
    source = written(tmp_path)["report.html"]
    row = source.partition("<code>layer1.conv</code>")[2].partition("</tr>")[0]
    assert re.findall(r'width="([\d.]+)"', row) == ["66.67", "25.0"]  # 128 and 48 of 192, the widest


def test_latencies_are_drawn_as_often_as_they_occurred_whatever_the_slowest_took():
    """Half of the inferences around 1 ms, half around 2 ms, and one in fifty hung for a second."""
    half = [0.95 + 0.1 * i / 48 for i in range(49)]
    percentiles = (*half, *(x + 1 for x in half), 2.06, 1000.0, 1000.0)
    outline, beyond = report._spread(percentiles, 4.0)
    assert (outline[0], outline[-1]) == ((0, 100), (100, 100))
    assert all(0 <= x <= 100 and 0 <= y <= 100 for x, y in outline)
    filled = [x for x, y in outline if y < 90]
    assert 23 <= min(filled) <= max(filled) <= 52
    assert not [x for x in filled if 28 < x < 47]
    assert 0.005 < beyond < 0.03


def test_many_layers_are_folded_behind_one_plot_and_few_are_not(tmp_path):
    few, many = (Page(written(tmp_path / str(n), layers=n)["report.html"]) for n in (3, 200))
    assert many.inside["details tr"] - few.inside["details tr"] >= 400
    assert "All 200 layers" in many.text and "All 200 matrices and kernels" in many.text
    assert many.inside["svg g"] == 400 and "svg g" not in few.inside


def test_a_run_without_any_pruning_has_no_empty_table(tmp_path):
    nothing = {
        "pruned": {"method": "none", "zeros": 0, "sparsity": 0.0, "layers": (), "widths": ()},
        "shrunk": {"widths": ()},
    }
    page = Page(written(tmp_path, history=None, **nothing)["report.html"])
    assert "This version was not pruned" in page.text
    assert "All 0" not in page.text


def test_junit_is_red_exactly_where_the_verdict_is_no_pass(tmp_path):
    unsure = Measured(value=0.3, low=0.29, high=0.31)
    suite = ElementTree.fromstring(
        written(tmp_path, validated={"verdict": judged(accuracy=2.41, latency=unsure, load=1.2)})["junit.xml"]
    )
    assert suite.tag == "testsuite"
    assert {k: suite.get(k) for k in ("tests", "failures", "errors")} == {"tests": "3", "failures": "1", "errors": "1"}
    accuracy, latency, load = suite.findall("testcase")
    assert accuracy.find("failure").get("message") == "Accuracy drop, points: 2.41, but at most 1.00 is asked for."
    assert "the measurement cannot tell differences of less than 0.010" in latency.find("error").text
    assert load.find("failure") is None and "Warning" in load.find("system-out").text
    good = ElementTree.fromstring(written(tmp_path)["junit.xml"])
    assert [len(case) for case in good.findall("testcase")] == [0, 0, 0]


def test_junit_replaces_what_xml_cannot_hold(tmp_path):
    bad = judge({"drop\0": 2.0}, [Limit(metric="drop\0", operator="<=", value=1.0)])
    case = ElementTree.fromstring(written(tmp_path, validated={"verdict": bad})["junit.xml"]).find("testcase")
    assert case.get("name") == "Drop\N{REPLACEMENT CHARACTER}"
    assert case.find("failure").text == "Drop\N{REPLACEMENT CHARACTER}: 2.00, but at most 1.00 is asked for."


def test_verdict_json_holds_the_verdict_and_is_json_for_every_parser(tmp_path):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    given_ = judge({"drop": math.inf}, [Limit(metric="drop", operator="<=", value=math.inf)])
    text = written(tmp_path, validated={"verdict": given_})["verdict.json"]
    made = json.loads(text, parse_constant=refuse)
    assert (made["model"], made["version"], made["outcome"]) == ("resnet50", "v0003", "fail")
    assert made["reasons"] == list(given_.reasons)
    assert made["checks"][0]["reason"] == given_.reasons[0]


def test_the_markdown_is_what_markdown_summary_returns_and_is_short(tmp_path):
    manifest, artifacts = run(tmp_path)
    report.write(tmp_path, manifest, artifacts)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert text == report.markdown_summary(manifest, artifacts)
    plain = text.replace("\N{NO-BREAK SPACE}", " ")
    for line in (
        "| Accuracy | 96.9 % | 96.4 % | −0.6 points |",
        "| Latency | 6.02 ms | 1.70 ms | 0.283 of dense (0.276 to 0.291), 2 threads |",
        "| File size | 94.1 MB | 24.4 MB | 0.260 of dense |",
        "| Parameters | 23.5 M | 6.11 M | 0.260 of dense |",
        "| MACs | 83.9 M | 21.7 M | 0.259 of dense |",
        "| layer1.conv | 128 → 48 | 37.5 % stay |",
    ):
        assert f"\n{line}\n" in plain
    assert len(text.splitlines()) < 50 and "\n\n\n" not in text


@pytest.mark.parametrize(
    ("made", "wanted"),
    [
        (figures.significant(0), "0"),
        (figures.significant(0.0999999), "0.100"),
        (figures.significant(-12.345), "−12.3"),
        (figures.significant(1234.5), "1 234"),
        (figures.significant(-3.2e-7), "−3.20e-07"),
        (figures.significant(math.nan), "not a number"),
        (figures.significant(-math.inf), "−∞"),
        (figures.percent(0.0001), "< 0.1 %"),
        (figures.percent(0.9999), "> 99.9 %"),
        (figures.percent(1.0), "100.0 %"),
        (figures.percent(0.0), "0.0 %"),
        (figures.percent(None), "–"),
        (figures.points(0.3), "+0.3 points"),
        (figures.points(-1.6), "−1.6 points"),
        (figures.points(-0.01), "±0.0 points"),
        (figures.size(999), "999 B"),
        (figures.size(999_960), "1.00 MB"),
        (figures.size(2_140_000_000), "2.14 GB"),
        (figures.amount(0), "0"),
        (figures.amount(4_089_000_000), "4.09 G"),
        (figures.ratio(1, 0), "–"),
        (figures.error(0.0), "0"),
        (figures.error(None), "–"),
        (figures.error(1.94e-6), "1.9e-06"),
        (figures.duration(0.04), "0.0 s"),
        (figures.duration(59.7), "1 min 0 s"),
        (figures.duration(3600 + 61), "1 h 1 min"),
    ],
)
def test_figures_are_rounded_as_people_read_them(made, wanted):
    assert made.replace("\N{NO-BREAK SPACE}", " ") == wanted


def test_text_has_enough_contrast_on_light_and_dark():
    """WCAG 2.1, success criterion 1.4.3: 4.5 to 1."""
    css = (Path(report.__file__).parent / "templates" / "report.css").read_text()
    light, dark = (dict(re.findall(r"--(\w+): #(\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", css, re.S))
    assert light.keys() == dark.keys()
    for colours in (light, dark):
        for ink in ("ink", "muted", "accent", "pass", "fail", "warn"):
            for ground in ("page", "panel"):
                assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


# Puts the page into frames of several widths, opens every fold, and reports what sticks out, overlaps or has no size.
MEASURE = """
const found = [];
for (const frame of document.querySelectorAll("iframe")) {
  const page = frame.contentDocument, wide = page.documentElement.clientWidth;
  page.querySelectorAll("details").forEach(fold => fold.open = true);
  const say = (what, element) => found.push(`${wide}: ${what}: ${element.outerHTML.slice(0, 120)}`);
  if (page.documentElement.scrollWidth > wide) say("scrolls sideways", page.body);
  const hidden = element => getComputedStyle(element.closest("thead") ?? element).position === "absolute";
  const shown = element => element.checkVisibility() && !hidden(element);
  const texts = element => [...element.childNodes].filter(node => node.nodeType === 3 && node.data.trim());
  const leaves = [...page.body.querySelectorAll("*")].filter(e => !e.closest("svg") && shown(e));
  const boxes = leaves.flatMap(element => texts(element).flatMap(node => {
    const range = page.createRange(); range.selectNodeContents(node);
    return [...range.getClientRects()].map(box => ({box, element}));
  }));
  for (const {box, element} of boxes) if (box.right > wide + 1 || box.left < -1) say("sticks out", element);
  boxes.sort((a, b) => a.box.top - b.box.top);
  boxes.forEach((a, i) => { for (let j = i + 1; j < boxes.length && boxes[j].box.top < a.box.bottom - 6; j++) {
    const b = boxes[j];
    if (Math.min(a.box.right, b.box.right) - Math.max(a.box.left, b.box.left) > 1) say("overlaps", b.element);
  } });
  for (const plot of page.querySelectorAll("svg")) {
    const box = plot.getBoundingClientRect();
    if (shown(plot) && (box.width < 20 || box.height < 5)) say("a plot without size", plot);
  }
  found.push(`${wide}: measured ${boxes.length} pieces of text on ${getComputedStyle(page.body).backgroundColor}`);
}
document.body.textContent = JSON.stringify(found);
"""


@pytest.mark.parametrize(
    ("scheme", "ground"), [(1, "rgb(255, 255, 255)"), (0, "rgb(16, 19, 22)")], ids=["light", "dark"]
)
@pytest.mark.parametrize("layers", [3, 60])
def test_nothing_overlaps_or_sticks_out_in_a_browser(tmp_path, scheme, ground, layers):
    long_name = ".encoder_layer_11.self_attention.out_proj"
    source = written(tmp_path, layers=layers, text=long_name)["report.html"]
    assert max(len(word) for word in Page(source).text.split()) > 40
    if CHROMIUM is None:
        return  # What follows is layout, which only a browser can tell.
    widths = (360, 768, 1400)
    faults, counts = seen(tmp_path, [(source, wide) for wide in widths], scheme)
    assert faults == []
    assert [wide for wide, _, _ in counts] == [*widths]
    assert all(pieces > 150 and colour == ground for _, pieces, colour in counts)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_no_verdict_breaks_the_page_in_a_browser(tmp_path):
    unsure = Measured(value=0.3, low=0.29, high=0.31)
    broken = {"latency": f"RuntimeError: {'a very long word '.replace(' ', '_') * 5}", "accuracy": "boom"}
    verdicts = {
        "Fail": judged(accuracy=2.41, latency=0.5, load=1.2),
        "Inconclusive": judged(latency=unsure),
        "Crashed": judge({}, LIMITS, crashed=broken),
    }
    pages = []
    for name, verdict in verdicts.items():
        source = written(tmp_path / name, validated={"verdict": verdict})["report.html"]
        assert ("Fail" if name == "Crashed" else name) in Page(source).text
        pages += [(source, wide) for wide in (390, 1400)]
    faults, counts = seen(tmp_path, pages, 1)
    assert faults == []
    assert len(counts) == len(pages)


def seen(tmp_path: Path, pages: list[tuple[str, int]], scheme: int) -> tuple[list[str], list[tuple[int, int, str]]]:
    """What a browser finds wrong with pages of these widths; and each one's width, pieces of text and background."""
    frames = "".join(
        f'<iframe style="width:{wide}px;height:900px;border:0" srcdoc="{html.escape(source)}"></iframe>'
        for source, wide in pages
    )
    wrapper = f"<!DOCTYPE html><body>{frames}<script>onload = () => {{ {MEASURE} }}</script>"
    (tmp_path / "wrapper.html").write_text(wrapper, encoding="utf-8")
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--blink-settings=preferredColorScheme={scheme}", (tmp_path / "wrapper.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    body = re.search(r"<body>(\[.*\])</body>", done.stdout, re.S)
    assert body, done.stdout[-500:]
    said = json.loads(html.unescape(body[1]))
    counts = [re.fullmatch(r"(\d+): measured (\d+) pieces of text on (.*)", line) for line in said]
    faults = [line for line, count in zip(said, counts, strict=True) if count is None]
    return faults, [(int(c[1]), int(c[2]), c[3]) for c in counts if c is not None]
