"""What is dead or constant in given weights, read off their values."""
