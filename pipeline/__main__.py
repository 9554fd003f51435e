"""`python -m pipeline` is `leanort`."""

from pipeline.cli import main

main()
