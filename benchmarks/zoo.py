"""Shrink a list of models at random and prove each: `python benchmarks/zoo.py MODELS.json --ratio 0.5 --seed 0 --out
zoo.jsonl`.

MODELS.json: [{"model": SPEC, "input": [C, H, W]}, ...]; SPEC as for `leanort deploy`; "input" is [C, T, H, W] for
clips, [T] for text and sound, [F, T] for spectrograms, and may be left out where the model says itself what it takes.
Every model runs in a process of its own, under a time and a memory limit: random weights, random norm parameters and
statistics, random groups of every cluster masked, folded, shrunk, proved, exported to ONNX with a dynamic batch, run in
onnxruntime at two batch sizes. One JSON line each, written as soon as it is known; a summary table at the end, also of
what was done before Ctrl-C.

--fit N fits the kept weights first, in closed form on N random samples, to what the dense network gives. `fit_error`:
how far the outputs are from the dense ones, masked and fitted, on other samples (share of the dense outputs' norm);
`fit_left`: the weights that stayed as they were, with the reason; `fit_refused`: why no fit ran.

status: exact    differences within 1e-5·max(1, max|y|) in torch and in onnxruntime, and the control dwarfs that; what
                 onnxruntime differs by may be more where the dense model itself, exported, is as far from torch
        refused  the engine or torch.export said no, or torch.onnx cannot translate even the dense model; the reason
                 names the operator
        failed   anything else
Exit codes: 0 all exact or refused · 1 something failed · 2 the list cannot be read · 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from foundation.rounding import allowance, scaled

KEYS = (
    "model", "status", "reason", "removable_params_share", "params_before", "params_after", "macs_before", "macs_after",
    "max_abs_diff", "output_scale", "control_diff", "ort_max_abs_diff", "dense_ort_diff", "capture_s", "analyse_s",
    "shrink_s", "peak_mb", "blocked", "fit_s", "fit_error", "fitted", "fit_left", "fit_refused",
)  # fmt: skip
# The control removes the same channels without zeroing them first; ten tolerances away it cannot be rounding.
CONTROL_FACTOR = 10.0
REDRAW, DRAWS = 1000, 4  # step of the seed, and how often weights are drawn where the output is zero everywhere
TOLERANCE = 1e-5  # of max(1, largest output), in torch and in onnxruntime


def main() -> int:
    """Run the list; exit 0 when every line is exact or refused."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path)
    parser.add_argument("--ratio", type=float, default=0.5, help="share of the groups of every cluster to remove")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("zoo.jsonl"))
    parser.add_argument("--time-limit", type=float, default=600.0, help="seconds per model")
    parser.add_argument("--memory-limit", type=float, default=12_000.0, help="MB per model")
    parser.add_argument(
        "--no-onnx", action="store_true", help="leave out the ONNX half (status is then of torch alone)"
    )
    parser.add_argument("--fit", type=int, default=0, metavar="N", help="fit the kept weights on N samples first")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(shrink_one(json.loads(args.one), args.ratio, args.seed, not args.no_onnx, args.fit)))
        return 0
    try:
        entries = read_entries(args.models)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        out = args.out.open("w", encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"{args.models}: {error}", file=sys.stderr)
        return 2
    lines: list[dict[str, Any]] = []
    stopped = False
    with out:
        try:
            for entry in entries:
                line = in_own_process(entry, args)
                lines.append(line)
                out.write(json.dumps(line) + "\n")
                out.flush()
                print(f"[{len(lines)}/{len(entries)}] {row(line)}", flush=True)
        except KeyboardInterrupt:
            stopped = True
            print(f"\nstopped after {len(lines)} of {len(entries)} models; their lines are in {args.out}")
    print(summary(lines))
    if stopped:
        return 130
    return 0 if all(line["status"] != "failed" for line in lines) else 1


def read_entries(path: Path) -> list[dict[str, Any]]:
    """The list in `path`, checked. Raises ValueError saying which entry is wrong and how, OSError where it cannot be
    read.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(entries, list):
        raise ValueError('give a list of {"model": SPEC, "input": [C, H, W]}')
    for at, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get("model"), str):
            raise ValueError(f'entry {at} is {json.dumps(entry)[:80]}; give {{"model": SPEC, "input": [C, H, W]}}')
        size = entry.get("input")
        whole = isinstance(size, list) and all(isinstance(n, int) and n > 0 for n in size)
        if size is not None and not (whole and 1 <= len(size) <= 4):
            raise ValueError(f"entry {at} ({entry['model']}): input is {size!r}; give [C, H, W], [C, T, H, W] or [T]")
    return entries


def in_own_process(entry: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """One model under the limits."""
    command = [sys.executable, __file__, str(args.models), "--ratio", str(args.ratio), "--seed", str(args.seed)]
    command += ["--one", json.dumps(entry), "--fit", str(args.fit)] + (["--no-onnx"] if args.no_onnx else [])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=printed, stderr=errors, env=environment)
        peak, reason, started = 0.0, "", time.monotonic()
        try:
            while process.poll() is None and not reason:
                time.sleep(0.1)
                peak = max(peak, resident(process.pid))
                if peak > args.memory_limit:
                    reason = f"over the memory limit of {args.memory_limit:.0f} MB"
                elif time.monotonic() - started > args.time_limit:
                    reason = f"over the time limit of {args.time_limit:.0f} s"
        finally:  # Ctrl-C as well
            if process.poll() is None:
                process.kill()
        process.wait()
        printed.seek(0)
        errors.seek(0)
        last = printed.read().strip().splitlines()[-1:]
        if not reason and process.returncode == 0 and last:
            line: dict[str, Any] = json.loads(last[0])
            return line
        tail = errors.read().strip().splitlines()[-1:]
        why = reason or (tail[0] if tail else f"exit code {process.returncode}")
        return {
            **dict.fromkeys(KEYS),
            "model": entry["model"],
            "status": "failed",
            "reason": why,
            "peak_mb": peak,
            "blocked": [],
        }


def resident(pid: int) -> float:
    """MB that a process holds; 0 when it has just ended."""
    try:
        return float(psutil.Process(pid).memory_info().rss) / 1e6
    except psutil.Error:
        return 0.0


def shrink_one(
    entry: dict[str, Any], ratio: float, seed: int, onnx: bool, samples: int = 0, draw: int = 0
) -> dict[str, Any]:
    """The line of one model, made in this process. `samples`: how many to fit on, 0 for no fit. `draw`: which random
    weights; where an activation at the end lets nothing through (depth that would be negative), the next ones are
    taken.
    """
    import numpy as np
    import torch

    from foundation.errors import CaptureError, LeanortError, RefusedError
    from pipeline.channels import analyse, capture, count_macs, prove, shrink, small  # before the clock runs
    from pipeline.models.find import load
    from pipeline.models.source import example

    torch.set_num_threads(1)
    line: dict[str, Any] = {**dict.fromkeys(KEYS), "model": entry["model"], "status": "failed", "blocked": []}
    try:
        size: Any = tuple(entry["input"]) if entry.get("input") else None
        source = load(entry["model"], input_size=size, seed=seed)
        model = source.build()
        randomise(model, seed + draw * REDRAW)
        started = time.perf_counter()
        captured = capture(model, example(source, batch=2, seed=seed))
        line["capture_s"] = round(time.perf_counter() - started, 3)
        started = time.perf_counter()
        analysis = analyse(captured)
        line["analyse_s"] = round(time.perf_counter() - started, 3)
        line["removable_params_share"] = round(analysis.removable_share, 5)
        line["params_before"], line["macs_before"] = analysis.params, analysis.macs
        line["blocked"] = [[b.op, b.params, b.node, b.reason] for b in analysis.blocked]
        rng = np.random.default_rng(seed)
        removed = {c.name: rng.random(c.size) < ratio for c in analysis.clusters}
        if samples:
            captured = fit(captured, analysis, removed, source, samples, line)
        folded = captured.fold(analysis.masks(removed))
        started = time.perf_counter()
        shrunk = shrink(folded, analysis, removed)
        line["shrink_s"] = round(time.perf_counter() - started, 3)
        line["params_after"] = count_parameters(shrunk.program)
        line["macs_after"] = count_macs(shrunk.program)
        expected = analysis.estimate(removed)
        inputs = [small(captured, batch=2, seed=k) for k in range(2)]
        proof = prove(folded, shrunk, inputs)
        line["max_abs_diff"], line["output_scale"] = proof.max_abs_diff, proof.output_scale
        if not proof.output_scale and draw < DRAWS - 1:
            return shrink_one(entry, ratio, seed, onnx, samples, draw + 1)
        line["control_diff"] = control(captured, analysis, removed, inputs[:1])
        if onnx:
            line["ort_max_abs_diff"], scale = in_onnxruntime(folded, shrunk.program, captured)
            line["output_scale"] = max(line["output_scale"], scale)
            if line["ort_max_abs_diff"] > allowance(TOLERANCE, line["output_scale"]):
                line["dense_ort_diff"] = scaled(*in_onnxruntime(captured, captured.program, captured))
        line["status"], line["reason"] = verdict(line, shrunk.refused, expected, onnx)
    except (CaptureError, RefusedError) as error:
        line["status"], line["reason"] = "refused", str(error)[:400]
    except LeanortError as error:
        line["reason"] = str(error)[:400]
    except Exception as error:
        line["reason"] = f"{type(error).__name__}: {str(error)[:400]}"
    line["peak_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
    return line


def fit(captured: Any, analysis: Any, removed: Any, source: Any, samples: int, line: dict[str, Any]) -> Any:
    """`captured` with its kept weights fitted to what it gives whole, or as it was where no fit runs; what happened is
    written into `line`. Raises FloatingPointError for a fit that is not finite.
    """
    import torch

    from pipeline.recovery.closed_form import recover

    parameters = set(captured.program.graph_signature.inputs_to_parameters.values())
    every = analysis.masks(removed)
    masks = {name: torch.from_numpy(mask) for name, mask in every.items() if name in parameters}
    draw = torch.Generator().manual_seed(samples)
    inputs = tuple(one.sample(samples, draw) for one in source.inputs)
    try:
        made = recover(captured, masks, inputs)
    except ValueError as error:
        line["fit_refused"] = str(error)[:400]
        return captured
    line["fit_s"] = round(made.seconds, 2)
    line["fitted"] = sum(not one.reason for one in made.fitted)
    line["fit_left"] = [[one.name, one.reason] for one in made.fitted if one.reason]
    fitted = captured.with_state(made.state)
    unlike = tuple(one.sample(2, draw) for one in source.inputs)
    line["fit_error"] = [distance(captured, one.fold(every), unlike) for one in (captured, fitted)]
    if not all(bool(torch.isfinite(v).all()) for v in made.state.values() if v.is_floating_point()):
        raise FloatingPointError("the fit gave weights that are not finite")
    return fitted


def distance(dense: Any, other: Any, inputs: Any) -> float:
    """How far the outputs are from the dense ones, as a share of their norm."""
    import torch

    from pipeline.channels.removal.verify import tensors_of

    with torch.no_grad():
        pairs = list(zip(tensors_of(dense(*inputs)), tensors_of(other(*inputs)), strict=True))
    off = sum(float((x.double() - y.double()).square().sum()) for x, y in pairs)
    whole = sum(float(x.double().square().sum()) for x, _ in pairs)
    return round(math.sqrt(off / max(whole, 1e-30)), 4)


def verdict(line: dict[str, Any], refusals: Any, expected: Any, onnx: bool) -> tuple[str, str | None]:
    """Exact, or what is missing for it."""
    tolerance = allowance(TOLERANCE, line["output_scale"])
    if line["control_diff"] is not None and not line["control_diff"] > CONTROL_FACTOR * tolerance:
        return "failed", f"the control differs by {line['control_diff']:.3g} only: the comparison proves nothing"
    if not line["max_abs_diff"] <= tolerance:
        return "failed", f"float32 rounding alone makes {line['max_abs_diff']:.3g}, tolerance {tolerance:.3g}"
    notes = [f"{len(refusals)} clusters kept groups"] if refusals else []
    if onnx and not line["ort_max_abs_diff"] <= tolerance:
        differs = f"onnxruntime differs by {line['ort_max_abs_diff']:.3g}, tolerance {tolerance:.3g}"
        if not line["ort_max_abs_diff"] <= yardstick(line["dense_ort_diff"], line["output_scale"]):
            return "failed", differs
        notes.append(f"{differs}; the dense model differs by {line['dense_ort_diff']:.3g} of its scale")
    if not refusals and (line["params_after"], line["macs_after"]) != (expected.params, expected.macs):
        return "failed", f"estimated {expected.params} parameters and {expected.macs} MACs, got another size"
    if line["params_after"] == line["params_before"]:
        return "refused", "nothing could be removed"
    return "exact", "; ".join(notes) or None


def yardstick(dense: float | None, scale: float) -> float:
    """What onnxruntime may differ by where it misses the tolerance, for outputs up to `scale`, as in a gate's parity.

    `dense` is what the dense model differs by between torch and onnxruntime on the same feeds, over max(1, its scale).
    """
    from validators.parity import ROUNDING_CEILING, YARDSTICK_MARGIN

    return YARDSTICK_MARGIN * allowance(dense, scale) if dense is not None and dense <= ROUNDING_CEILING else 0.0


def randomise(model: Any, seed: int) -> None:
    """Random values for norm parameters, running statistics and every parameter that starts constant (layer
    scales, zeros).

    With the values that models start with (scale 1, shift 0, mean 0) a wrong removal could pass for an exact one.
    """
    import torch

    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if not value.dtype.is_floating_point or not value.numel():
                continue
            norm = name.rsplit(".", 1)[-1] in ("running_mean", "running_var")
            if "running_var" in name:
                value.copy_(torch.rand(value.shape, generator=draw) + 0.5)
            elif norm:
                value.copy_(torch.randn(value.shape, generator=draw) * 0.3)
            elif isinstance(value, torch.nn.Parameter) and bool((value == value.flatten()[0]).all()):
                if float(value.flatten()[0]) == 0.0:
                    value.copy_(torch.randn(value.shape, generator=draw) * 0.1)
                else:
                    value.copy_(torch.rand(value.shape, generator=draw) + 0.5)


def count_parameters(program: Any) -> int:
    """Parameter elements of a program, tied ones once."""
    held = {program.state_dict[n].data_ptr(): program.state_dict[n].numel() for n in program.graph_signature.parameters}
    return sum(held.values())


def control(captured: Any, analysis: Any, removed: Any, inputs: Any) -> float | None:
    """The largest difference when the same channels are removed without zeroing them first."""
    from pipeline.channels import shrink
    from pipeline.channels.removal.verify import difference

    careless = shrink(captured, analysis, removed, check_zero=False)
    worst, _, _ = difference(captured, careless, inputs)
    return worst


def in_onnxruntime(model: Any, exported: Any, captured: Any) -> tuple[float, float]:
    """(largest difference, largest output) of `model` in torch and the program `exported` in onnxruntime, at two batch
    sizes.

    Raises RefusedError where the batch is fixed, or where torch.onnx cannot translate the dense model either.
    """
    import onnxruntime
    import torch

    from exporters.translatable import translatable
    from foundation.errors import RefusedError
    from pipeline.channels import centre, small
    from pipeline.channels.removal.verify import tensors_of

    if not captured.dynamic_batch:
        raise RefusedError("The model's own code fixes the batch size.", "It cannot be exported with a dynamic batch.")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        program = translatable(centre(exported).program)
        try:
            torch.onnx.export(program, (), str(path), dynamo=True, opset_version=23, external_data=True, verbose=False)
        except Exception as error:
            if translates(captured.program):
                raise
            raise RefusedError(f"torch.onnx cannot translate the dense model: {root(error)}", "") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        worst = scale = 0.0
        for batch in (1, 3):
            feed = small(captured, batch=batch, seed=batch)
            names = [i.name for i in session.get_inputs()]
            used = [x for x in feed if isinstance(x, torch.Tensor)]
            user = list(exported.graph_signature.user_inputs)
            by_name = dict(zip(user, used, strict=True))
            with torch.no_grad():
                want = tensors_of(model(*feed))
            got = session.run(None, {n: by_name[n].numpy() for n in names})
            if len(got) != len(want):
                raise ValueError(f"{len(want)} outputs in torch, {len(got)} in onnxruntime")
            for x, y in zip(want, got, strict=True):
                if tuple(x.shape) != y.shape:
                    raise ValueError(f"an output of shape {tuple(x.shape)} is {y.shape} in onnxruntime")
                if x.numel():
                    worst = max(worst, float((x.double() - torch.from_numpy(y).double()).abs().nan_to_num(1e9).max()))
                    scale = max(scale, float(x.abs().max()))
        return worst, scale


def translates(program: Any) -> bool:
    """Whether torch.onnx takes this program."""
    import torch

    from exporters.translatable import translatable

    try:
        torch.onnx.export(translatable(program), (), dynamo=True, opset_version=23, verbose=False)
    except Exception:  # whatever it is, the shrunk program is not to blame
        return False
    return True


def root(error: BaseException) -> str:
    """First lines of the error that started the chain: the outer ones only say how far the exporter came."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:250]


def row(line: dict[str, Any]) -> str:
    """One line of the table."""

    def show(key: str, form: str) -> str:
        return "-" if line[key] is None else format(line[key], form)

    before, after = line["params_before"], line["params_after"]
    left = f"{after / before:.3f}" if before and after else "-"
    return (
        f"{line['model']:<38} {line['status']:<8} share {show('removable_params_share', '.4f')} left {left} "
        f"diff {show('max_abs_diff', '.1e')} scale {show('output_scale', '.1e')} control {show('control_diff', '.1e')} "
        f"ort {show('ort_max_abs_diff', '.1e')} s {show('capture_s', '.1f')}/{show('analyse_s', '.2f')}/"
        f"{show('shrink_s', '.2f')} {show('peak_mb', '.0f')} MB {fit_words(line)}{line['reason'] or ''}"
    )


def fit_words(line: dict[str, Any]) -> str:
    """What the fit did, for `row`; nothing where none was asked for."""
    if line["fit_refused"]:
        return f"no fit: {line['fit_refused']} "
    if line["fit_error"] is None:
        return ""
    before, after = line["fit_error"]
    counts = f"{line['fitted']} fitted, {len(line['fit_left'])} left"
    return f"fit {line['fit_s']:.1f} s, {counts}, error {before:.3f} -> {after:.3f} "


def summary(lines: list[dict[str, Any]]) -> str:
    """Counts by status, and what blocks most."""
    count = Counter(line["status"] for line in lines)
    blocked: Counter[str] = Counter()
    for line in lines:
        for op, params, _, reason in line["blocked"]:
            blocked[f"{op}: {reason}"] += params
    top = "\n".join(f"  {n:>12,}  {what}" for what, n in blocked.most_common(12))
    total = len(lines)
    return (
        f"\n{total} models: {count['exact']} exact ({count['exact'] / max(total, 1):.1%}), {count['refused']} refused, "
        f"{count['failed']} failed\nparameters that stay, by reason:\n{top}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
