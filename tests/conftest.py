"""What holds for every test: onnxruntime reports nothing, in whichever order a test imports things."""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
