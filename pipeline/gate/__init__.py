"""Yes or no: measuring what a policy can limit, judging it, and saying it in files that CI reads."""
