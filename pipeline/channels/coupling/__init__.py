"""Which channels go together: walking the graph, solving the ties, naming the groups."""
