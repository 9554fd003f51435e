"""Attention of any rank."""

import pytest
import torch

from exporters.translatable import translatable


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("between", [(), (3, 2), (2, 3, 2)], ids=str)
def test_attention_of_any_rank(program_of, check, attend, between, masked, tmp_path):
    draw = [torch.randn(4, *between, 5, 8) for _ in range(3)]
    program = program_of(attend(masked), *draw)
    check(program, tmp_path / "model.onnx", [x[:3] for x in draw])
    inner = translatable(program)
    assert inner is not program
    torch.testing.assert_close(inner.module()(*draw), program.module()(*draw))


def test_four_dimensions_stay_as_they_are(program_of, attend):
    program = program_of(attend(), *[torch.randn(4, 3, 5, 8) for _ in range(3)])
    assert translatable(program) is program
