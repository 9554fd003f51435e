"""What pipeline, exporters and validators all stand on: errors, files, the tolerance rule (standard library only), and
the program editor (torch).
"""
