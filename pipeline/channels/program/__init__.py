"""The captured graph: capturing it, running it, and the exact zeros in it."""
