"""The race in words: what the table does not say by itself, and its lines on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from exporters.fusions import fused_attention
from exporters.to_ort import session_config
from pipeline.artifacts.race import Candidate


def statements(
    rows: Sequence[Candidate], winner: Candidate, *, flushed: str, guilty: Iterable[tuple[str, ...]], attentions: int
) -> Iterator[str]:
    """What the user must know beside the table.

    `flushed` says what became of denormal weights, "" if there were none; `guilty` are the sets of optimisers that
    break this model; `attentions` counts those of the shrunk program.
    """
    if flushed:
        yield flushed
    for names in dict.fromkeys(guilty):
        yield (
            f"onnxruntime's {', '.join(names)} breaks this model and is switched off; load the file with the "
            f"session configuration entries {session_config(names)}."
        )
    if attentions and winner.operators:
        yield _attention(rows, winner, attentions)
    named = {row.name: row for row in rows}
    plain, own = named.get("portable"), named.get("ort-portable")
    if plain and own and plain.latencies and own.latencies:
        cost = own.latencies[0].ratio / plain.latencies[0].ratio
        yield f"The portable .ort file takes {cost:.2f} times the run time of the portable ONNX file here."
    if (packed := named[winner.name].zstd_bytes) is not None:
        yield (
            f"The zeros buy no CPU time: onnxruntime multiplies them like any other number. Compressed with zstd the "
            f"shipped file is {packed / 1e6:.3g} MB of {winner.bytes / 1e6:.3g} MB."
        )


def _attention(rows: Sequence[Candidate], winner: Candidate, attentions: int) -> str:
    """How many attentions are one operator in the file that ships, and in the others."""
    counts = {row.name: fused_attention(row.operators) for row in rows if row.operators}
    fused = [f"{name} {count}" for name, count in counts.items() if count]
    have = counts.get(winner.name, 0)
    warning = "" if have >= attentions else "ATTENTION IS NOT FUSED in the shipped file: "
    others = (
        f" (others: {', '.join(fused)})"
        if fused
        else "; the pattern of this exporter is not one that onnxruntime's fusions know, and only opset 23 and above "
        "has an Attention operator"
    )
    return f"{warning}{have} of {attentions} attentions are one operator in {winner.name}{others}."


def lines(rows: Sequence[Candidate], winner: Candidate) -> Iterator[str]:
    """The race as a terminal shows it; what was skipped is left to the report."""
    width = max(16, *(len(row.name) for row in rows))
    for row in rows:
        if row.outcome == "skipped":
            continue
        word = "ships" if row.name == winner.name else row.outcome
        figures = [f"{timed.median_ms:.3g} ms" for timed in row.latencies]
        figures += [f"{row.bytes / 1e6:.3g} MB"] if row.bytes else []
        yield f"{row.name:<{width}} {word:<7} {'  '.join(figures)}  {row.reason or row.technique}"
