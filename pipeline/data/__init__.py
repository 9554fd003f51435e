"""Data sets: where samples come from, and their train, calibration and test parts."""
