"""An ONNX file as a torch.nn.Module: one file per family of operators, joined in `table`."""
