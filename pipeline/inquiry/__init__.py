"""Questions about a run or a version: what would go, what went and why, what differs."""
