"""The choice as a table: rows of a race in, the winner, its reason, and why what is faster does not ship out."""

import pytest

from exporters import ExportError
from pipeline.artifacts import Candidate, CandidateLatency
from pipeline.race.choice import choose
from pipeline.recipe.race import OptimizeSection

WIDTH = 0.02  # of an interval, to either side


def row(name, *ratios, drop=None, loss=None, **known):
    """A row that passed, timed at as many settings as there are ratios; with a `drop` it is in reduced precision."""
    latencies = tuple(
        CandidateLatency(
            threads=1,
            batch_size=number,
            median_ms=ratio,
            ratio=ratio,
            low=ratio * (1 - WIDTH),
            high=ratio * (1 + WIDTH),
        )
        for number, ratio in enumerate(ratios, start=1)
    )
    known = {"outcome": "passed", "file": f"model.{name}.onnx", "bytes": 1_000_000} | known
    return Candidate(
        name=name, budget="rounding" if drop is None else "accuracy", latencies=latencies, score_lost=drop,
        score_lost_dense=drop, loss=loss, **known,
    )  # fmt: skip


def failed(name, **known):
    return row(name, outcome="failed", reason="not the same function: so and so", **known)


HOST = {"portable": False, "isa": "avx512"}
SESSION = {"session": {"optimization.disable_specified_optimizers": "ConvMulFusion"}}
CPU_ONLY = 'belongs to this CPU only; optimize.ship = "host" lets it ship'
OWN_FORMAT = "is in onnxruntime's own format; optimize.ort_format = true lets it ship"

BOTH = (
    "belongs to this CPU only and is in onnxruntime's own format; "
    'optimize.ship = "host" and optimize.ort_format = true let it ship'
)


def int8(name, ratio, drop, loss, **known):
    return row(f"int8-{name}", ratio, drop=drop, loss=loss, **known)


TABLE = {
    "alone": ({}, [row("a", 1.0)], "a ships: 1 ms, and it is the only one that passed and may.", {}),
    "the first, where no other is faster": (
        {}, [row("a", 1.0), row("b", 1.2)], "a ships: 1 ms, and no other one is faster beyond doubt.", {},
    ),
    "the first, where another is faster but not beyond doubt": (
        {}, [row("a", 1.0), row("b", 0.97)], "a ships: 1 ms, and no other one is faster beyond doubt.",
        {"b": "is not faster beyond doubt"},
    ),
    "the fastest": (
        {}, [row("a", 1.0), row("b", 0.8), row("c", 0.7)],
        "c ships: 0.7 ms, 0.700 of a, the fastest of 3 that may ship.", {},
    ),
    "the fastest over all settings, not at one": (
        {}, [row("a", 1.0, 1.0), row("b", 0.5, 1.9), row("c", 0.8, 0.8)],
        "c ships: 0.8 ms, 0.800 of a, the fastest of 3 that may ship.", {},
    ),
    "the first that may, which need not be what others are timed against": (
        {}, [row("host", 1.0, **HOST), row("a", 2.0), row("b", 1.97)],
        "a ships: 2 ms, and no other one is faster beyond doubt.",
        {"host": CPU_ONLY, "b": "is not faster beyond doubt"},
    ),
    "a file for this CPU stays a row": (
        {}, [row("a", 1.0), row("host", 0.5, **HOST)], "a ships: 1 ms, and it is the only one that passed and may.",
        {"host": CPU_ONLY},
    ),
    "a slower one has nothing to explain": (
        {}, [row("a", 1.0), row("host", 1.5, **HOST)], "a ships: 1 ms, and it is the only one that passed and may.", {},
    ),
    "a file for this CPU, where the recipe lets it": (
        {"ship": "host"}, [row("a", 1.0), row("host", 0.5, **HOST)],
        "host ships: 0.5 ms, 0.500 of a, the fastest of 2 that may ship.", {},
    ),
    "onnxruntime's own format stays a row": (
        {}, [row("a", 1.0), row("ort", 0.5, file="model.ort")],
        "a ships: 1 ms, and it is the only one that passed and may.", {"ort": OWN_FORMAT},
    ),
    "onnxruntime's own format, where the recipe lets it": (
        {"ort_format": True}, [row("a", 1.0), row("ort", 0.5, file="model.ort")],
        "ort ships: 0.5 ms, 0.500 of a, the fastest of 2 that may ship.", {},
    ),
    "two reasons at once": (
        {}, [row("a", 1.0), row("ort-host", 0.5, file="model.ort", **HOST)],
        "a ships: 1 ms, and it is the only one that passed and may.", {"ort-host": BOTH},
    ),
    "what needs no session entries before what does": (
        {}, [row("a", 0.5, **SESSION), row("b", 1.0)], "b ships: 1 ms, and it is the only one that passed and may.",
        {"a": "needs session entries to be right, and one that needs none goes first"},
    ),
    "with session entries, where all need them": (
        {}, [row("a", 1.0, **SESSION), row("b", 0.5, **SESSION)],
        "b ships: 0.5 ms, 0.500 of a, the fastest of 2 that may ship.", {},
    ),
    "the smallest": (
        {"prefer": "size"}, [row("a", 0.5, bytes=2_000_000), row("b", 1.0)],
        "b ships: the smallest of 2 that may, 1 MB.",
        {"a": 'is larger, and the smallest ships; optimize.prefer = "latency" lets the fastest ship'},
    ),
    "the most accurate of those that are as fast in int8": (
        {}, [row("a", 1.0), int8("minmax", 0.50, 0.7, 0.10), int8("entropy", 0.51, 0.0, 0.11)],
        "int8-entropy ships: 0.51 ms, 0.510 of a; 2 candidates in reduced precision are as fast, and this one is the "
        "most accurate.",
        {"int8-minmax": "is as fast as int8-entropy, as far as the race can tell, and less accurate"},
    ),
    "of the equally accurate in int8 the one of lower cross-entropy": (
        {}, [row("a", 1.0), int8("minmax", 0.50, 0.7, 0.10), int8("entropy", 0.51, 0.7, 0.09)],
        "int8-entropy ships: 0.51 ms, 0.510 of a; 2 candidates in reduced precision are as fast, and this one is the "
        "most accurate.",
        {"int8-minmax": "is as fast as int8-entropy, as far as the race can tell, and less accurate"},
    ),
    "the fastest in int8, where another is more accurate and slower": (
        {}, [row("a", 1.0), int8("minmax", 0.50, 0.7, 0.10), int8("entropy", 0.60, 0.0, 0.01)],
        "int8-minmax ships: 0.5 ms, 0.500 of a, the fastest of 3 that may ship.", {},
    ),
    "int8 for any machine, where int8 for this one is faster": (
        {}, [row("a", 1.0), int8("minmax", 0.6, 0.1, 0.1), int8("minmax-host", 0.5, 0.0, 0.1, **HOST)],
        "int8-minmax ships: 0.6 ms, 0.600 of a, the fastest of 2 that may ship.", {"int8-minmax-host": CPU_ONLY},
    ),
    "never one that failed or was skipped, however small or fast": (
        {"prefer": "size"}, [failed("a", bytes=1), row("b", 1.0), row("c", outcome="skipped", file="", bytes=0)],
        "b ships: the smallest of 1 that may, 1 MB.", {},
    ),
    "none is proven: the first that was made for any machine, unproven": (
        {}, [failed("host", **HOST), failed("int8-minmax", drop=9.0), failed("b"), row("ort", 1.0, file="model.ort")],
        "b goes on unproven, since none that may ship passed: not the same function: so and so.", {"ort": OWN_FORMAT},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "rows", "why", "passed_over"), TABLE.values(), ids=TABLE)
def test_the_choice(settings, rows, why, passed_over):
    found = choose(OptimizeSection(**settings), rows)
    assert found.why == why
    assert found.winner.name == why.partition(" ")[0]
    assert found.passed_over == passed_over
    reasons = {made.name: made.reason for made in found.explained(rows)}
    for given in rows:
        assert reasons[given.name] == (
            f"does not ship: {passed_over[given.name]}" if given.name in passed_over else given.reason
        )


def test_where_nothing_may_ship_at_all_each_reason_is_said():
    rows = [failed("a", file=""), row("host", 1.0, **HOST)]
    with pytest.raises(ExportError, match=r"No candidate may ship. a: not the same .*; host: may not ship\."):
        choose(OptimizeSection(), rows)
