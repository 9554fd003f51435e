"""Words, figures, tables and drawings for people."""
