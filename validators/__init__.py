"""Any two runnable models in, a report out. Knows nothing of the pipeline or the exporters.

from pathlib import Path
from validators import OrtRunner, compare, random_feeds

a, b = (OrtRunner(Path(name), threads=1) for name in ("before.onnx", "after.onnx"))
report = compare(a, b, random_feeds(a.inputs, seed=0), atol=1e-5, rtol=0)
print(report.passed, report.max_abs, report.reasons)
"""

from validators.accuracy import AccuracyComparison, AccuracyReport, compare_accuracy, evaluate
from validators.errors import ValidationError
from validators.feeds import Feed, edge_feeds, random_feeds, real_feeds
from validators.gates import Check, Limit, Measured, Verdict, judge
from validators.latency import LatencyReport, RunnerLatency, race
from validators.parity import ChainReport, OutputParity, ParityReport, compare, compare_arrays, compare_chain
from validators.runners import InputSpec, OrtRunner, Runner, TorchRunner
from validators.structure import StructureReport, measure

__all__ = [
    "AccuracyComparison",
    "AccuracyReport",
    "ChainReport",
    "Check",
    "Feed",
    "InputSpec",
    "LatencyReport",
    "Limit",
    "Measured",
    "OrtRunner",
    "OutputParity",
    "ParityReport",
    "Runner",
    "RunnerLatency",
    "StructureReport",
    "TorchRunner",
    "ValidationError",
    "Verdict",
    "compare",
    "compare_accuracy",
    "compare_arrays",
    "compare_chain",
    "edge_feeds",
    "evaluate",
    "judge",
    "measure",
    "race",
    "random_feeds",
    "real_feeds",
]
