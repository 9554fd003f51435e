"""Start-up of the commands, and what each fingerprint covers: `python benchmarks/house.py [--before OLDER/CHECKOUT]`.

Makes one version of a tiny net, then runs the commands that only read it, and a deploy that has nothing to do; with
`--before`, an older checkout of this project does the same with a version of its own, the two in turn. Processor
seconds (user + system) of whole processes, medians over `--runs`. MODEL: another model for the versions, such as
resnet50, trained for one epoch (minutes).
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from pipeline.release.fingerprint import cone

HERE = Path(__file__).resolve().parents[1]
COMMANDS = (
    "list", "show NAME", "diff NAME NAME", "why NAME", "gate NAME", "promote NAME/v0001", "gc NAME --dry-run",
    "verify NAME",
)  # fmt: skip
QUICK = [
    "--name", "measured",
    "--set", "baseline.train={epochs=1}",
    "--set", "finetune.train={epochs=1}",
    "--set", "gate.seconds=0.3",
    "--set", 'optimize={candidates=["portable"], seconds=0.2}',
    "--set", "gate.max_accuracy_drop_points=100.0",
    "--set", "gate.max_latency_ratio=50.0",
]  # fmt: skip


def leanort(checkout: Path, *words: str) -> float:
    """Processor seconds of one command of the project in `checkout`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-m", "pipeline", *words],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=f"{HERE / 'tests' / 'pipeline' / 'tiny.py'}:build")
    parser.add_argument("--before", type=Path, help="an older checkout, measured in turn with this one")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    checkouts = {"now": HERE} | ({"before": args.before.resolve()} if args.before else {})
    size = ["--input-size", "3,16,16"] if ".py:" in args.model else []
    with tempfile.TemporaryDirectory() as scratch:
        deploys = {name: ["deploy", args.model, *size, *QUICK, "--out", f"{scratch}/{name}"] for name in checkouts}
        for name, checkout in checkouts.items():
            print(f"making a version ({name}) ...", flush=True)
            leanort(checkout, *deploys[name])
        print(f"\n{'processor seconds, median':36}" + "".join(f"{name:>10}" for name in checkouts))
        for command in (*COMMANDS, "deploy, everything reused"):
            seconds: dict[str, list[float]] = {name: [] for name in checkouts}
            for _ in range(args.runs):
                for name, checkout in checkouts.items():
                    reading = [*command.replace("NAME", "measured").split(), "--out", f"{scratch}/{name}"]
                    seconds[name].append(leanort(checkout, *(deploys[name] if "deploy" in command else reading)))
            row = "".join(f"{statistics.median(found):10.2f}" for found in seconds.values())
            print(f"{command.replace('NAME', 'MODEL'):36}{row}", flush=True)
        stored = sum(p.stat().st_size for p in Path(scratch, "now").rglob("*") if p.is_file() and not p.is_symlink())
        print(f"\n{stored / 1e6:.0f} MB in the version that was verified")
    print("\nmodules that a stage's fingerprint covers")
    for path in sorted((HERE / "pipeline" / "stages").glob("s[0-9]_*.py")):
        reached = cone(f"pipeline.stages.{path.stem}")
        lines = sum(len((HERE / file).read_text(encoding="utf-8").splitlines()) for file in reached.values())
        print(f"  {path.stem:16}{len(reached):4} modules{lines:8,} lines")


if __name__ == "__main__":
    main()
