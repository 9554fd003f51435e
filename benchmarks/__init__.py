"""Measurements and attacks that are run by hand, each with a make target."""
