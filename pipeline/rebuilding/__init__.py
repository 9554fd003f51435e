"""The shrunk model as a module of the user's own class, where its own `forward` can be it."""
