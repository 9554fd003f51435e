"""What pipeline, exporters and validators all stand on: errors, files, the tolerance rule. Standard library only."""
