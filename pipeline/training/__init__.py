"""Training and recovery with masks held."""
