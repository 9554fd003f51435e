"""Which of onnxruntime's optimisers breaks a model, found by switching them off.

onnxruntime has no call that lists its optimisers; the names are those of its C++ classes (`onnxruntime/core/optimizer`,
as of 1.31), and a name that a version does not know is ignored by it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

OPTIMIZERS: tuple[str, ...] = (
    # Rewrite rules and passes at BASIC.
    "EliminateIdentity", "EliminateSlice", "EliminateDropout", "UnsqueezeElimination", "ExpandElimination",
    "CastElimination", "CastChainElimination", "NoopElimination", "DivMulFusion", "FuseReluClip", "GemmSumFusion",
    "GemmTransposeFusion", "NotWhereFusion", "PreShapeNodeElimination", "ConvAddFusion", "ConvMulFusion",
    "ConvBNFusion", "Pad_Fusion", "MatMul_BatchNormalization_Fusion", "LabelEncoderFusion", "ConstantFolding",
    "ConstantSharing", "CommonSubexpressionElimination", "FreeDimensionOverrideTransformer", "TransposeOptimizer",
    "PropagateCastOps", "DoubleQDQPairsRemover", "GatherSliceToSplitFusion", "GatherToSliceFusion", "ReshapeFusion",
    "MatMulAddFusion", "LayerNormFusionL1", "GeluFusionL1", "SliceConcatToSpaceToDepthFusion", "ConcatSliceElimination",
    "WhereDummyDq", "WeightBiasQuantization", "EnsureUniqueDQForNodeUnit", "QDQPropagationTransformer",
    "ReluQuantRewrite", "ClipQuantRewrite", "ConstantFoldingDQ", "Level1_RuleBasedTransformer",
    # Fusions at EXTENDED.
    "GemmActivationFusion", "MatMulActivationFusion", "MatMulIntegerToFloatFusion", "DynamicQuantizeMatMulFusion",
    "ConvActivationFusion", "ConvAddActivationFusion", "GeluFusionL2", "LayerNormFusionL2", "SimplifiedLayerNormFusion",
    "AttentionFusion", "EmbedLayerNormFusion", "BiasDropoutFusion", "MatmulTransposeFusion", "BiasGeluFusion",
    "SkipLayerNormFusion", "BiasSkipLayerNormFusion", "FastGeluFusion", "QuickGeluFusion", "BiasSoftmaxFusion",
    "MatMulScaleFusion", "QDQSelectorActionTransformer", "QDQS8ToU8Transformer", "QDQFinalCleanupTransformer",
    "DQMatMulNBitsFusion", "MatMulNBitsQkvFusion", "MatMulNBitsMlpFusion", "GroupQueryAttentionFusion",
    "GroupQueryAttentionPreNormFusion", "Level2_RuleBasedTransformer",
    # Memory layout and CPU specific rewrites at ALL.
    "NchwcTransformer", "NhwcTransformer", "Avx2WeightS8ToU8Transformer", "RemoveDuplicateCastTransformer",
    "GqaValueLayoutTransformer", "MemcpyTransformer",
)  # fmt: skip


def guilty_optimizers(
    holds: Callable[[tuple[str, ...]], bool], names: Sequence[str] = OPTIMIZERS
) -> tuple[str, ...] | None:
    """The optimisers without which `holds` is true; `holds` is asked with the names that are switched off.

    First each is switched off alone, since one is guilty as a rule. Else all are off, and one after the other is let in
    again as long as `holds` stays true; what must stay off is a smallest such set, though not the only one. None when
    the model is broken with all of them off: then none of these is to blame.
    """
    if not holds(tuple(names)):
        return None
    for name in names:
        if holds((name,)):
            return (name,)
    off = list(names)
    for name in names:
        fewer = [other for other in off if other != name]
        if holds(tuple(fewer)):
            off = fewer
    return tuple(off)
