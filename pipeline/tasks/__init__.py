"""What a model is for: one file per task, with its loss, its scores and its pictures."""
