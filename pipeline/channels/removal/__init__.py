"""Cutting the dead channels out, the ledger of it, and the proof."""
