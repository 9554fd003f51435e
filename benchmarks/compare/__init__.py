"""This engine against the pruning libraries of the field: same dense weights, data and MACs, several seeds."""
