"""Random attacks on the product, one module for each kind of target; see `__main__`."""
