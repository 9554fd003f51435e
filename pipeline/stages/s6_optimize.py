"""Make every candidate, prove each by its own budget, race those that passed; the fastest ships, the reasons with it.

    model.onnx -> candidates -> proof -> race -> winner

A candidate that is not proven is not timed and cannot ship. One that was made but may not ship (a file of this host's
CPU, say) is a row all the same, so that what it would have bought is known.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
import torch
import zstandard
from matplotlib.figure import Figure
from scipy.special import log_softmax

from exporters.candidates import Made, NotApplicable, Source, make
from exporters.denormals import count_denormals, flush_denormals
from exporters.errors import ExportError
from exporters.fusions import expected_attention, fused_attention
from exporters.guilty import guilty_optimizers
from exporters.quantize import sensitivity
from exporters.summary import describe
from exporters.to_ort import session_config
from pipeline.artifacts.eager import Baseline, Pruned
from pipeline.artifacts.program import Exported, Shrunk
from pipeline.artifacts.race import Candidate, CandidateLatency, Optimized
from pipeline.channels.program.capture import Captured
from pipeline.data.parts import Data
from pipeline.gate.precise import SEEDS, Precise
from pipeline.models.source import ModelSource, example
from pipeline.progress import Progress
from pipeline.recipe.race import OptimizeSection
from validators.accuracy import AccuracyReport, compare_accuracy, evaluate
from validators.errors import ValidationError
from validators.feeds import Feed, edge_feeds, random_feeds, real_feeds
from validators.latency import race
from validators.parity import ParityReport, compare, compare_chain
from validators.runners import OrtRunner, Runner, TorchRunner
from validators.structure import measure

BATCHES = (1, 3)
EVALUATION_BATCH = 64
CALIBRATION_BATCH = 32
PROBES = 32
SURPRISE = "cross-entropy"
LOADS = 3
# What a bundle may hold beside the shipped file: the fastest proven one of each kind of machine.
KEPT = (
    "portable",
    "host",
    "ort-portable",
    "ort-host",
    "int8-minmax",
    "int8-entropy",
    "int8-percentile",
    "int8-dynamic",
)

# Those that onnxruntime's optimisers make.
LEVELS = ("portable", "basic", "host", "ort-portable", "ort-host")

Array = np.ndarray[Any, np.dtype[Any]]


def run(
    cfg: OptimizeSection,
    out: Path,
    source: ModelSource,
    data: Data,
    baseline: Baseline,
    pruned: Pruned,
    shrunk: Shrunk,
    exported: Exported,
    progress: Progress,
) -> Optimized:
    """Write the candidates that may ship, `candidates.json` and a plot of the race.

    Where no candidate that may ship is proven, the first one goes on unproven, and the gate fails it. Raises
    ExportError where not even that could be made.
    """
    field = _Field.open(cfg, out, source, data, baseline, shrunk, exported)
    rows: list[Candidate] = []
    with progress.bar("candidates", len(cfg.names) + 1) as move:
        for number, name in enumerate(cfg.names, start=1):
            move(number - 1, name)
            rows.append(_candidate(field, name, progress))
        move(len(cfg.names), "racing")
        rows = _raced(field, rows)
        move(len(cfg.names) + 1, f"{sum(row.outcome == 'passed' for row in rows)} of {len(rows)} passed")
    winner, why = _choose(cfg, rows)
    rows = [_kept(row, winner, out, compress=not shrunk.removed and pruned.zeros > 0) for row in rows]
    _sweep(out, {row.file for row in rows})
    made = Optimized(
        folder=out,
        onnxruntime=onnxruntime.__version__,
        ships=winner.file,
        shipped=winner.name,
        proven=winner.outcome == "passed",
        why=why,
        operators_before=describe(exported.onnx).operators,
        candidates=tuple(rows),
        statements=tuple(_statements(field, rows, winner)),
    )
    (out / "candidates.json").write_text(made.model_dump_json(indent=1) + "\n", encoding="utf-8")
    _plot(rows, winner, out / "candidates.svg")
    for line in _lines(rows, winner):
        progress.say(f"  {line}")
    progress.say(f"  {why}")
    for statement in made.statements:
        progress.say(f"  {statement}")
    return made


@dataclass
class _Field:
    """What every candidate is made from and held against."""

    cfg: OptimizeSection
    source: Source
    data: Data
    reference: _Remembered
    feeds: list[Feed]
    input: str
    dense: Path
    accuracies: dict[str, AccuracyReport]
    expected_attention: int
    precise: list[Precise]
    guilty: dict[str, tuple[str, ...]]
    ranking: list[str] | None
    flushed: str

    @classmethod
    def open(
        cls,
        cfg: OptimizeSection,
        out: Path,
        source: ModelSource,
        data: Data,
        baseline: Baseline,
        shrunk: Shrunk,
        exported: Exported,
    ) -> _Field:
        """The shrunk program as the reference, and the feeds: random, zeros and real samples."""
        summary = describe(exported.onnx)
        inputs = example(source)
        outputs = [spec.name for spec in summary.outputs]
        program = shrunk.program()
        reference = _Remembered(
            TorchRunner(
                program,
                example=inputs,
                threads=torch.get_num_threads(),
                input_names=[spec.name for spec in summary.inputs],
                output_names=outputs,
                name="shrunk",
            )
        )
        name = summary.inputs[0].name
        made = cls(
            cfg=cfg,
            source=Source(
                onnx=exported.onnx,
                program=lambda: program,
                example=inputs,
                calibration=lambda: _calibration(data, name, cfg.calibration_samples),
                folder=out,
            ),
            data=data,
            reference=reference,
            feeds=[
                *random_feeds(reference.inputs, seed=cfg.seed, batches=BATCHES),
                *edge_feeds(reference.inputs, seed=cfg.seed, batches=BATCHES[:1]),
                *real_feeds({name: data.sample("calibration", max(BATCHES)).numpy()}, batches=BATCHES),
            ],
            input=name,
            dense=baseline.onnx,
            accuracies={},
            expected_attention=expected_attention(program),
            precise=[
                Precise(Captured(program, inputs, program.state_dict), reference, outputs, seed) for seed in SEEDS
            ],
            guilty={},
            ranking=None,
            flushed="",
        )
        made._flush(out)
        return made

    def _flush(self, out: Path) -> None:
        """Build the candidates from a file without denormals, unless that changes the answers."""
        found = count_denormals(self.source.onnx)
        if not found.count:
            return
        words = f"{found.count:,} of {found.elements:,} weights are denormal numbers"
        before = OrtRunner(self.source.onnx, threads=1, name="with denormals")
        path, chosen = _flushed(self.source.onnx, out / ".flushed.onnx", before, self.feeds, self.cfg.parity)
        if path is None:
            self.flushed = f"{words}; they stay, since flushing any of them changes the output."
            return
        after = OrtRunner(path, threads=1, name="flushed")
        effect = race(
            {"with denormals": before, "flushed": after},
            self.feeds[0],
            reference="with denormals",
            seconds=1.0,
            seed=self.cfg.seed,
        ).runners["flushed"]
        self.flushed = (
            f"{words}; {chosen:,} were set to zero, the output stays the same, and the latency is "
            f"{effect.ratio.value:.3f} of before ({effect.ratio.low:.3f} to {effect.ratio.high:.3f})."
        )
        self.source = replace(self.source, onnx=path)

    def parity(self, runner: Runner) -> ParityReport:
        """`runner` against the shrunk model; rounding is measured in float64 only where the limit is missed."""
        precise, *shaken = self.precise
        pair = [self.reference, runner]
        return compare_chain(pair, self.feeds, atol=self.cfg.parity, rtol=0.0, precise=precise, shaken=shaken).hops[0]

    def accuracy(self, name: Literal["dense", "shrunk"]) -> AccuracyReport:
        """The dense or the shrunk model on the calibration part; evaluated once."""
        if name not in self.accuracies:
            runner = OrtRunner(self.dense, threads=1) if name == "dense" else self.reference.runner
            self.accuracies[name] = self.evaluate(runner)
        return self.accuracies[name]

    def evaluate(self, runner: Runner) -> AccuracyReport:
        """A classifier on the calibration part."""
        batches = self.data.batches("calibration", EVALUATION_BATCH)
        return evaluate(runner, batches, metrics={SURPRISE: _surprise})


class _Remembered:
    """A runner that answers each feed once; nine candidates are compared with the same answers."""

    def __init__(self, runner: Runner) -> None:
        self.name, self.inputs, self.threads = runner.name, runner.inputs, runner.threads
        self.runner = runner
        self._answers: dict[int, tuple[Mapping[str, Array], dict[str, Array]]] = {}

    def infer(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """The answer to this very feed object; holding on to it keeps its id from being used again."""
        if id(feed) not in self._answers:
            self._answers[id(feed)] = (feed, self.runner.infer(feed))
        return self._answers[id(feed)][1]


def _surprise(logits: Array, labels: Array) -> Array:
    """Cross-entropy of each sample, in nats: finer than right or wrong, of which a small set has few."""
    found: Array = -log_softmax(logits.astype(np.float64), axis=1)[np.arange(len(labels)), labels]
    return found


def _calibration(data: Data, name: str, count: int) -> Iterator[Mapping[str, Array]]:
    """The first `count` samples of the calibration part, in batches of one size, as onnxruntime's histograms need."""
    size = min(CALIBRATION_BATCH, count, len(data.calibration))
    for number, (x, _) in enumerate(data.batches("calibration", size), start=1):
        if len(x) < size or number * size > count:
            return
        yield {name: x.numpy()}


# --- Proof ------------------------------------------------------------------------------------------------------------


def _candidate(field: _Field, name: str, progress: Progress) -> Candidate:
    """Make, flush and prove one candidate; whatever goes wrong is its row."""
    began = time.perf_counter()
    try:
        row = _proven(field, make(name, field.source), {})
        if row.outcome == "failed" and row.budget == "rounding":
            row = _routed(field, row, progress)
        elif row.outcome == "failed" and row.accuracy_drop_points is not None:
            row = _kept_in_float(field, row, progress)
    except NotApplicable as error:
        row = Candidate(name=name, outcome="skipped", reason=str(error))
    except (ExportError, ValidationError) as error:
        row = Candidate(name=name, outcome="failed", reason=error.message)
    return row.model_copy(update={"seconds": round(time.perf_counter() - began, 2)})


def _proven(field: _Field, made: Made, session: Mapping[str, str]) -> Candidate:
    """Hold one file against the shrunk model, by its own budget. Raises ValidationError where it cannot run."""
    denormals, notes = _without_denormals(field, made, session)
    runner = OrtRunner(made.path, threads=1, name=made.name, session=session)
    row = Candidate(
        name=made.name,
        technique=made.technique,
        outcome="passed",
        file=made.path.name,
        portable=made.portable,
        isa=made.isa,
        budget=made.budget,
        allowed=field.cfg.parity if made.budget == "rounding" else field.cfg.max_accuracy_drop_points,
        session=dict(session),
        bytes=made.bytes,
        denormals=denormals,
        operators=made.operators,
        notes=(*made.notes, *notes),
    )
    parity = field.parity(runner)
    figures: dict[str, Any] = {"max_scaled": parity.max_scaled, "top1_agreement": parity.top1}
    if made.budget == "rounding":
        if not parity.passed:
            figures |= {"outcome": "failed", "reason": f"not the same function: {parity.reasons[0]}"}
        return row.model_copy(update=figures)
    if parity.max_scaled is None:  # an output is missing, of another shape or type, or not a number
        return row.model_copy(update=figures | {"outcome": "failed", "reason": _unanswered(parity)})
    found = field.evaluate(runner)
    # Against the dense model too, as the gate will: what pruning lost is gone from the budget.
    drops = {
        name: compare_accuracy(field.accuracy(name), found, seed=field.cfg.seed).drop.value
        for name in ("shrunk", "dense")
    }
    figures["accuracy_drop_points"] = drops["shrunk"]
    figures["accuracy_drop_points_dense"] = drops["dense"]
    figures["cross_entropy"] = float(np.mean(found.scores[SURPRISE]))
    against = max(drops, key=lambda name: drops[name])
    allowed = field.cfg.max_accuracy_drop_points
    if drops[against] > allowed:
        reason = f"loses {drops[against]:.2f} points of accuracy against the {against} model, {allowed:g} allowed"
        figures |= {"outcome": "failed", "reason": reason}
    return row.model_copy(update=figures)


def _unanswered(parity: ParityReport) -> str:
    """Why a reduced-precision candidate has no comparable output; a plain difference is not among the reasons."""
    entry = next((e for e in parity.outputs if e.max_abs is None), None)
    return f"{entry.feed}: {entry.output}: {entry.reason}" if entry else parity.reasons[0]


def _without_denormals(field: _Field, made: Made, session: Mapping[str, str]) -> tuple[int, tuple[str, ...]]:
    """Flush what folding made denormal, as long as the answers stay; how many are left, and what was done."""
    if made.path.suffix != ".onnx":
        return 0, ()
    found = count_denormals(made.path).count
    if not found:
        return 0, ()
    before = OrtRunner(made.path, threads=1, session=session)
    scratch = made.path.with_name(f".{made.name}.flushed.onnx")
    path, chosen = _flushed(made.path, scratch, before, field.feeds, field.cfg.parity, session)
    if path is None:
        return found, (f"{found:,} denormal constants stay, since flushing changes the output",)
    # External weights keep the name that the graph knows them by.
    flush_denormals(made.path, made.path, only=None if chosen == found else _safe_names(made.path, scratch))
    _remove(scratch)
    return found - chosen, (f"{chosen:,} denormal constants were set to zero",)


def _safe_names(before: Path, after: Path) -> frozenset[str]:
    return frozenset(count_denormals(before).tensors.keys() - count_denormals(after).tensors.keys())


def _flushed(
    src: Path,
    dst: Path,
    before: Runner,
    feeds: Sequence[Feed],
    atol: float,
    session: Mapping[str, str] | None = None,
) -> tuple[Path | None, int]:
    """`src` with as many of its denormals flushed as leave the answers alone: all, else tensor by tensor, else None."""

    def harmless(only: frozenset[str] | None) -> int:
        count = flush_denormals(src, dst, only=only).count
        after = OrtRunner(dst, threads=1, session=session)
        return count if compare(before, after, feeds, atol=atol, rtol=0.0).passed else 0

    if count := harmless(None):
        return dst, count
    good = frozenset(name for name in count_denormals(src).tensors if harmless(frozenset({name})))
    if good and (count := harmless(good)):
        return dst, count
    _remove(dst)
    return None, 0


def _remove(path: Path) -> None:
    for part in (path, path.with_name(f"{path.name}.data")):
        part.unlink(missing_ok=True)


def _routed(field: _Field, row: Candidate, progress: Progress) -> Candidate:
    """Find the optimisers that break a candidate, make it without them, and prove that; else `row` as it was."""

    def without(disabled: tuple[str, ...]) -> Candidate | None:
        """The candidate made and loaded without those, where it is proven."""
        session = {} if row.file.endswith(".ort") else session_config(disabled)
        try:
            made = make(row.name, replace(field.source, disabled=disabled))
            if not field.parity(OrtRunner(made.path, threads=1, session=session)).passed:
                return None
            return _proven(field, made, session)
        except (ExportError, ValidationError):
            return None

    def holds(disabled: tuple[str, ...]) -> bool:
        if row.name in LEVELS:
            return without(disabled) is not None
        # Not onnxruntime's work, so making it again changes nothing: only loading it does.
        runner = OrtRunner(field.source.folder / row.file, threads=1, session=session_config(disabled))
        return field.parity(runner).passed

    # What broke one candidate is the first suspect for the next.
    guilty = next((known for known in dict.fromkeys(field.guilty.values()) if holds(known)), None)
    if guilty is None:
        progress.say(f"  {row.name} is {row.reason}; looking for the optimiser that breaks it")
        guilty = guilty_optimizers(holds)
    again = without(guilty) if guilty else None
    if not guilty or again is None or again.outcome != "passed":
        return row
    field.guilty[row.name] = guilty
    note = f"made without {', '.join(guilty)}, which breaks this model; load it with the session entries given here"
    return again.model_copy(update={"notes": (*again.notes, note)})


def _kept_in_float(field: _Field, row: Candidate, progress: Progress) -> Candidate:
    """Leave the nodes that hurt most in float, twice as many each time, until the accuracy budget holds."""
    if field.ranking is None:
        progress.say(f"  {row.name} {row.reason}; looking for the nodes that hurt most")
        probe = field.data.sample("calibration", PROBES).numpy()
        field.ranking = list(
            sensitivity(field.source.onnx, batches=field.source.calibration(), probe={field.input: probe})
        )
    count = 1
    while count < len(field.ranking):
        exclude = tuple(field.ranking[:count])
        try:
            again = _proven(field, make(row.name, replace(field.source, exclude=exclude)), {})
        except ExportError:  # nothing is left to quantise
            return row
        if again.outcome == "passed":
            shown = ", ".join(exclude[:3]) + (", ..." if count > 3 else "")
            return again.model_copy(update={"notes": (*again.notes, f"in float: {shown}")})
        count *= 2
    return row


# --- Race -------------------------------------------------------------------------------------------------------------


def _raced(field: _Field, rows: Sequence[Candidate]) -> list[Candidate]:
    """Time those that passed against each other, at every number of threads and batch size, and weigh each alone."""
    cfg, folder = field.cfg, field.source.folder
    running = [row for row in rows if row.outcome == "passed"]
    if not running:
        return list(rows)
    latencies: dict[str, list[CandidateLatency]] = {row.name: [] for row in running}
    for threads in cfg.threads:
        runners = {
            row.name: OrtRunner(folder / row.file, threads=threads, name=row.name, session=row.session)
            for row in running
        }
        for batch in cfg.batch_sizes:
            feed = random_feeds(field.reference.inputs, seed=cfg.seed, batches=(batch,))[0]
            report = race(runners, feed, reference=running[0].name, seconds=cfg.seconds, seed=cfg.seed)
            for name, timed in report.runners.items():
                latencies[name].append(
                    CandidateLatency(
                        threads=threads,
                        batch_size=batch,
                        median_ms=timed.median_ms,
                        ratio=timed.ratio.value,
                        low=timed.ratio.low,
                        high=timed.ratio.high,
                    )
                )
    feed = random_feeds(field.reference.inputs, seed=cfg.seed, batches=cfg.batch_sizes[:1])[0]
    return [
        row.model_copy(
            update=_weighed(folder / row.file, feed, cfg.threads[0], row.session)
            | {"latencies": tuple(latencies[row.name])}
        )
        if row.name in latencies
        else row
        for row in rows
    ]


def _weighed(path: Path, feed: Feed, threads: int, session: Mapping[str, str]) -> dict[str, Any]:
    """Size, load time and peak memory, the latter in a fresh process."""
    found = measure(path, feed, threads=threads, loads=LOADS, session=session)
    return {"bytes": found.bytes, "load_ms": found.load_ms, "peak_rss": found.peak_rss}


def _choose(cfg: OptimizeSection, rows: Sequence[Candidate]) -> tuple[Candidate, str]:
    """The candidate that ships, and a sentence that says why.

    The first allowed one ships unless another is faster beyond the race's doubt: the whole interval of its ratio,
    averaged over the settings, is below that of the first. Of several in reduced precision that are as fast as the
    fastest, as far as the race can tell, the most accurate ships. With `prefer = "size"` the smallest ships.
    """
    allowed = [
        row
        for row in rows
        if row.outcome == "passed"
        and (row.portable or cfg.ship == "host")
        and (not row.file.endswith(".ort") or cfg.ort_format)
    ]
    if not allowed:
        made = (
            row for row in rows if row.file and row.outcome == "failed" and row.budget == "rounding" and row.portable
        )
        first = next(made, None)
        if first is None:
            reasons = "; ".join(f"{row.name}: {row.reason or 'may not ship'}" for row in rows)
            raise ExportError(f"No candidate may ship. {reasons}.", "Change optimize.candidates in the recipe.")
        return first, f"{first.name} goes on unproven, since none that may ship passed: {first.reason}."
    # Without special session entries before with them: a user who forgets them gets another function.
    plain = [row for row in allowed if not row.session] or allowed
    first = plain[0]
    if cfg.prefer == "size":
        winner = min(plain, key=lambda row: row.bytes)
        return winner, f"{winner.name} ships: the smallest of {len(plain)} that may, {winner.bytes / 1e6:.3g} MB."
    base = _mean([entry.ratio for entry in first.latencies])
    faster = [row for row in plain[1:] if _mean([entry.high for entry in row.latencies]) < base * _below(first)]
    winner = min(faster, key=lambda row: _mean([entry.ratio for entry in row.latencies]), default=first)
    level = [row for row in faster if row.budget == "accuracy" and _as_fast(row, winner)]
    if winner.budget == "accuracy":
        winner = min(level, key=lambda row: (row.accuracy_drop_points or 0.0, row.cross_entropy or 0.0))
    count = f"{len(plain)} that may ship" if len(plain) > 1 else "those that may ship"
    if winner is first:
        others = "no other one is faster beyond doubt" if len(plain) > 1 else "it is the only one that passed and may"
        return winner, f"{winner.name} ships: {winner.latencies[0].median_ms:.3g} ms, and {others}."
    ratio = _mean([entry.ratio for entry in winner.latencies]) / base
    took = f"{winner.latencies[0].median_ms:.3g} ms, {ratio:.3f} of {first.name}"
    if len(level) > 1 and winner.budget == "accuracy":
        equals = f"{len(level)} candidates in reduced precision are as fast"
        return winner, f"{winner.name} ships: {took}; {equals}, and this one is the most accurate."
    return winner, f"{winner.name} ships: {took}, the fastest of {count}."


def _as_fast(row: Candidate, fastest: Candidate) -> bool:
    """Whether the race leaves it open which of the two is faster: their intervals meet."""
    return _mean([entry.low for entry in row.latencies]) <= _mean([entry.high for entry in fastest.latencies])


def _below(first: Candidate) -> float:
    """How far below the first one's ratio another must be: the lower end of the first one's own interval."""
    return _mean([entry.low / entry.ratio for entry in first.latencies])


def _mean(ratios: Sequence[float]) -> float:
    """The geometric mean, as ratios are averaged."""
    return float(np.exp(np.mean(np.log(ratios))))


# --- Words, files and plot --------------------------------------------------------------------------------------------


def _kept(row: Candidate, winner: Candidate, out: Path, compress: bool) -> Candidate:
    """The row with its compressed size; it keeps its file only where that ships or a bundle may want it."""
    path = out / row.file
    if not row.file or not path.is_file():
        return row.model_copy(update={"file": ""})
    packed = len(zstandard.ZstdCompressor(level=3).compress(path.read_bytes())) if compress else None
    stays = row.name == winner.name or (row.outcome == "passed" and row.name in KEPT)
    return row.model_copy(update={"file": row.file if stays else "", "zstd_bytes": packed})


def _sweep(out: Path, kept: set[str]) -> None:
    """Remove what candidates left here, but for the kept files and what belongs to them."""
    stems = {name.rpartition(".")[0] for name in kept if name}
    for path in [*out.glob("model.*"), *out.glob(".*.onnx*")]:
        own = path.name in kept or path.name.removesuffix(".data") in kept
        config = path.name.removesuffix(".required_operators.config")
        if not own and not (config != path.name and config in stems):
            path.unlink()


def _statements(field: _Field, rows: Sequence[Candidate], winner: Candidate) -> Iterator[str]:
    """What the table does not say by itself."""
    if field.flushed:
        yield field.flushed
    named = {row.name: row for row in rows}
    for guilty in dict.fromkeys(field.guilty.values()):
        yield (
            f"onnxruntime's {', '.join(guilty)} breaks this model and is switched off; load the file with the "
            f"session configuration entries {session_config(guilty)}."
        )
    if field.expected_attention and winner.operators:
        counts = {row.name: fused_attention(row.operators) for row in rows if row.operators}
        fused = [f"{name} {count}" for name, count in counts.items() if count]
        have = counts.get(winner.name, 0)
        yield (
            f"{'' if have >= field.expected_attention else 'ATTENTION IS NOT FUSED in the shipped file: '}"
            f"{have} of {field.expected_attention} attentions are one operator in {winner.name}"
            + (
                f" (others: {', '.join(fused)})"
                if fused
                else "; the pattern of this exporter is not one that "
                "onnxruntime's fusions know, and only opset 23 and above has an Attention operator"
            )
            + "."
        )
    plain, own = named.get("portable"), named.get("ort-portable")
    if plain and own and plain.latencies and own.latencies:
        cost = own.latencies[0].ratio / plain.latencies[0].ratio
        yield f"The portable .ort file takes {cost:.2f} times the run time of the portable ONNX file here."
    if (packed := named[winner.name].zstd_bytes) is not None:
        yield (
            f"The zeros buy no CPU time: onnxruntime multiplies them like any other number. Compressed with zstd the "
            f"shipped file is {packed / 1e6:.3g} MB of {winner.bytes / 1e6:.3g} MB."
        )


def _lines(rows: Sequence[Candidate], winner: Candidate) -> Iterator[str]:
    """The race as a terminal shows it; what was skipped is left to the report."""
    for row in rows:
        if row.outcome == "skipped":
            continue
        word = "ships" if row.name == winner.name else row.outcome
        figures = [f"{timed.median_ms:.3g} ms" for timed in row.latencies]
        figures += [f"{row.bytes / 1e6:.3g} MB"] if row.bytes else []
        yield f"{row.name:<16} {word:<7} {'  '.join(figures)}  {row.reason or row.technique}"


def _plot(rows: Sequence[Candidate], winner: Candidate, path: Path) -> None:
    """Draw the medians of every race, as SVG, one group of bars per candidate."""
    shown = [row for row in rows if row.latencies]
    figure = Figure(figsize=(7, max(1.5, 0.35 * len(shown) + 0.9)), layout="constrained")
    axes = figure.subplots()
    settings = len(shown[0].latencies) if shown else 0
    for number in range(settings):
        heights = [row.latencies[number].median_ms for row in shown]
        at = shown[0].latencies[number]
        height = 0.8 / settings
        axes.barh(
            [index + height * (number - (settings - 1) / 2) for index in range(len(shown))],
            heights,
            height=height,
            label=f"{at.threads} thread(s), batch {at.batch_size}",
        )
    axes.set_yticks(range(len(shown)), [f"{row.name}{' (ships)' if row.name == winner.name else ''}" for row in shown])
    axes.invert_yaxis()
    axes.set_xlabel("latency, median, ms")
    if settings:
        axes.legend(fontsize=7)
    figure.savefig(path)
