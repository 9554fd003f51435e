"""Any two runnable models in, a report out. Knows nothing of the pipeline or the exporters.

from pathlib import Path
from validators import OrtRunner, compare, random_feeds

a, b = (OrtRunner(Path(name), threads=1) for name in ("before.onnx", "after.onnx"))
report = compare(a, b, random_feeds(a.inputs, seed=0), atol=1e-5, rtol=0)
print(report.passed, report.max_abs, report.reasons)
"""

from validators.accuracy import (
    AccuracyComparison,
    AccuracyReport,
    Metric,
    Similarity,
    compare_accuracy,
    evaluate,
    similarity,
    top_k,
)
from validators.divergence import Divergence, TensorStatistics, first_divergence, repro_pack
from validators.errors import ValidationError
from validators.feeds import Feed, edge_feeds, random_feeds, real_feeds
from validators.gates import Check, Limit, Measured, Verdict, judge
from validators.latency import Bound, LatencyReport, Ratios, RunnerLatency, race
from validators.macs import count_macs
from validators.matching import Trail, first_unmatched, onnx_trail, torch_trail
from validators.parity import ChainReport, OutputParity, ParityReport, compare, compare_arrays, compare_chain
from validators.runners import InputSpec, OrtRunner, Runner, TorchRunner
from validators.structure import StructureReport, measure

__all__ = [
    "AccuracyComparison",
    "AccuracyReport",
    "Bound",
    "ChainReport",
    "Check",
    "Divergence",
    "Feed",
    "InputSpec",
    "LatencyReport",
    "Limit",
    "Measured",
    "Metric",
    "OrtRunner",
    "OutputParity",
    "ParityReport",
    "Ratios",
    "Runner",
    "RunnerLatency",
    "Similarity",
    "StructureReport",
    "TensorStatistics",
    "TorchRunner",
    "Trail",
    "ValidationError",
    "Verdict",
    "compare",
    "compare_accuracy",
    "compare_arrays",
    "compare_chain",
    "count_macs",
    "edge_feeds",
    "evaluate",
    "first_divergence",
    "first_unmatched",
    "judge",
    "measure",
    "onnx_trail",
    "race",
    "random_feeds",
    "real_feeds",
    "repro_pack",
    "similarity",
    "top_k",
    "torch_trail",
]
