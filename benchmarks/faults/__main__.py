"""Attack the product: `python -m benchmarks.faults [CAMPAIGN ...] [--size N] [--seed S]`.

Each campaign breaks something N times, at random, and counts what came of it. In the column "wrong" only 0 is right:
a half version, a wrong yes, a traceback, something run or written that should not have been. What was wrong is listed
below the table, with the seed that repeats it.

kills      SIGKILL during deploy, promote and rollback: nothing half, nothing lost, log and pointer agree afterwards
processes  SIGKILL of one of two processes that train together: one line, an end; the next run has the same weights
versions   a stored version changed, copied or added to, its hashes made right again or not: verify and promote say no
models     a model file that computes something else in one place: check says no; the same model rewritten: yes
mistakes   recipes and options of nonsense: one line, exit code 2, nothing written
archives   a packed bundle cut, flipped and rebuilt with hostile entries: bundle --check refuses, in bounded space
images     images cut, flipped and forged: the server goes on, the folder of images names the file
readers    threads that list and read while versions are promoted: always one current version, always whole
load       gates while the machine is busy: never a wrong yes, never a wrong no
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.faults import archives, images, load, mistakes, models, processes, store
from benchmarks.faults.outcome import Outcome

CAMPAIGNS = {
    "kills": (store.kills, 30),
    "processes": (processes.kills, 10),
    "versions": (store.versions, 300),
    "readers": (store.readers, 300),
    "models": (models.run, 40),
    "mistakes": (mistakes.run, 200),
    "archives": (archives.run, 150),
    "images": (images.run, 300),
    "load": (load.run, 10),
}


def main() -> int:
    """Run the campaigns; exit 0 when nothing went wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("campaigns", nargs="*", help=f"of {', '.join(CAMPAIGNS)}; all when none is named")
    parser.add_argument("--size", type=int, help="how many times; each campaign has a default")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31, help="repeats a run")
    given = parser.parse_args()
    unknown = [name for name in given.campaigns if name not in CAMPAIGNS]
    if unknown:
        parser.error(f"no campaign {unknown[0]!r}; there are {', '.join(CAMPAIGNS)}")
    console = Console()
    console.print(f"seed {given.seed}")
    table = Table("campaign", "tries", "refused", "accepted", "wrong", "seconds", box=None, pad_edge=False)
    wrong: list[str] = []
    for name in given.campaigns or CAMPAIGNS:
        run, tries = CAMPAIGNS[name]
        began = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix=f"faults-{name}-") as folder:
            outcome: Outcome = run(Path(folder), given.size or tries, random.Random(given.seed))
        seconds = time.perf_counter() - began
        counts = (outcome.tries, outcome.refused, outcome.accepted, len(outcome.wrong))
        table.add_row(name, *map(str, counts), f"{seconds:.0f}")
        console.print(f"{name}: {outcome.tries} tries, {len(outcome.wrong)} wrong, {seconds:.0f} s")
        wrong += [f"{name}: {what}" for what in outcome.wrong]
    console.print(table)
    for what in wrong:
        console.print(f"  wrong: {what}", markup=False, highlight=False)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
