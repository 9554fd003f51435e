"""The pictures that stages write beside their tables."""
