"""LayerNorm over removed channels as one operator: residual streams stored centred."""
