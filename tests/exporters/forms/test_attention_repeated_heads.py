"""One head of keys and values for all."""

import torch


def test_one_head_of_keys_and_values_for_all(program_of, check, attend, tmp_path):
    draw = [torch.randn(4, heads, 5, 8) for heads in (3, 1, 1)]
    program = program_of(attend(), *draw)
    check(program, tmp_path / "model.onnx", [x[:3] for x in draw], opset=23)
