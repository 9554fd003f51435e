"""The recipe: every choice of a run as plain schema, one file per section; nothing here runs anything."""
