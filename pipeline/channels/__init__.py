"""The structural shrinker: capture -> analyse -> masks -> shrink -> prove. Pure graph analysis, no I/O.

captured = capture(model, (example,))
analysis = analyse(captured)
removed  = {cluster.name: flags, ...}                  # True = goes
folded   = captured.fold(analysis.masks(removed))      # or weights that a fine-tuning under these masks gave
small    = shrink(folded, analysis, removed)
proof    = prove(folded, small, inputs)
"""

from pipeline.channels.centring.centre import Centred, centre
from pipeline.channels.coupling.groups import Analysis, Blocked, Cluster, Size, analyse
from pipeline.channels.coupling.layers import Layer, layers
from pipeline.channels.dead.liveness import Liveness, dead_groups, liveness
from pipeline.channels.operators.trace import Policy
from pipeline.channels.program.capture import Captured, capture, small
from pipeline.channels.program.macs import count_macs
from pipeline.channels.removal.ledger import Fold, Ledger, Refusal
from pipeline.channels.removal.recover import Trainable, with_weights
from pipeline.channels.removal.rewrite import Shrunk, shrink
from pipeline.channels.removal.verify import Proof, prove

__all__ = [
    "Analysis",
    "Blocked",
    "Captured",
    "Centred",
    "Cluster",
    "Fold",
    "Layer",
    "Ledger",
    "Liveness",
    "Policy",
    "Proof",
    "Refusal",
    "Shrunk",
    "Size",
    "Trainable",
    "analyse",
    "capture",
    "centre",
    "count_macs",
    "dead_groups",
    "layers",
    "liveness",
    "prove",
    "shrink",
    "small",
    "with_weights",
]
