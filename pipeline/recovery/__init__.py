"""Recovery in closed form: weights of the pruned network fitted to what the dense one computes, without labels."""
