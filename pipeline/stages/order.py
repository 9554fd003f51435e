"""The product on one screen: what `deploy` does, top to bottom."""

from pipeline.stages import (
    s0_baseline,
    s1_prune,
    s2_finetune,
    s3_fold,
    s4_shrink,
    s5_export,
    s6_optimize,
    s7_validate,
)

STAGES = (
    s0_baseline,  # model + data -> the dense source, kept for ever
    s1_prune,  # choose and mask
    s2_finetune,  # recover, masks held
    s3_fold,  # masks into weights
    s4_shrink,  # remove dead channels, proven equal
    s5_export,  # ONNX
    s6_optimize,  # onnxruntime's graph optimisation
    s7_validate,  # parity, accuracy, latency, size -> verdict
)
