"""Whether a pruned model comes back as its own class: `make smaller MODELS=models.json [ARGS="NAME ..."]`.

MODELS: a list of {"model": SPEC, "input": [C, H, W]}, as for `make zoo`. Weights and norm statistics are random, which
hides no mistake; half of the groups of every layer go. One row each, then the counts.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks.zoo import randomise, read_entries
from foundation.errors import LeanortError
from pipeline import channels
from pipeline.channels.coupling.analyse import analyse
from pipeline.channels.dead.liveness import liveness
from pipeline.models.find import load
from pipeline.models.graph import graph_of
from pipeline.rebuilding.rebuild import rebuild
from pipeline.recipe.prune import PruneSection
from pipeline.selection import choose
from pipeline.selection.criteria import Evidence
from pipeline.selection.kinds import policy_of
from pipeline.training import masks as masking


def row(entry: dict[str, Any]) -> tuple[bool, str]:
    """(whether it is the original class, its row of the table)."""
    size = tuple(entry["input"]) if entry.get("input") else None
    source = load(entry["model"], input_size=size, seed=0)
    model = source.build()
    randomise(model, 0)
    captured = graph_of(model, source)
    cfg = PruneSection(align=8)
    analysis = analyse(captured, policy_of(cfg.groups))
    maskable = masking.maskable(model)
    seen = Evidence({name: value.detach() for name, value in captured.state.items()})
    removed = choose.choose_groups(analysis, seen, cfg, cfg.ratio, maskable).removed
    folded = captured.fold({name: mask for name, mask in analysis.masks(removed).items() if name in maskable})
    live = liveness(analysis, folded.state)
    shrunk = channels.shrink(folded, analysis, live.dead, refused=live.refusals)
    began = time.perf_counter()
    made, structure = rebuild(model, folded, analysis, live.dead, shrunk)
    seconds = time.perf_counter() - began
    program = sum(value.numel() for value in {id(one): one for one in shrunk.program.parameters()}.values())
    counts = [sum(p.numel() for p in model.parameters()) / 1e6, program / 1e6]
    counts.append(sum(p.numel() for p in made.parameters()) / 1e6 if made else counts[1])
    words = structure.why.partition(": ")[2] if not made else structure.why.partition("; ")[2].partition(" (")[0]
    return structure.original, (
        f"| {entry['model']} | {'original class' if made else 'program'} | {counts[0]:.2f} | {counts[1]:.2f} "
        f"| {counts[2]:.2f} | {seconds:.1f} | {words[:120]} |"
    )


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("names", nargs="*", help="parts of the names of those to take; all where left out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    entries = read_entries(options.models)
    entries = [one for one in entries if not options.names or any(part in one["model"] for part in options.names)]
    print("| model | it is | M parameters, dense | program | module | s | |\n|---|---|---|---|---|---|---|")
    originals = 0
    for entry in entries:
        try:
            original, text = row(entry)
        except LeanortError as error:
            original, text = False, f"| {entry['model']} | refused | | | | | {error.message[:120]} |"
        originals += original
        print(text, flush=True)
    print(f"\noriginal class: {originals} of {len(entries)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
