"""The race of stage 6: candidates made, proven by a budget, timed against each other, and one of them chosen."""
