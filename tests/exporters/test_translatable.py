"""Forms that torch.onnx does not take are brought into ones that it does: what holds for all of them."""

import pkgutil

import torch
from torch import nn
from torch.export import export

from exporters import forms
from exporters.translatable import translatable


class Routed(nn.Module):
    """Samples are sent to one of two layers: how many go where is read off the data."""

    def __init__(self):
        super().__init__()
        self.low, self.high = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        few = (x[:, 0] > 0).sum().item()
        torch._check(few >= 0)
        torch._check(few <= x.shape[0])
        low, high = torch.split(x, [few, x.shape[0] - few])
        return torch.cat([self.low(low), self.high(high)])


def test_sizes_read_off_data_can_be_translated_again(program_of, check, tmp_path):
    program = program_of(Routed(), torch.randn(4, 6))
    for opset in (18, 20):
        check(program, tmp_path / "routed.onnx", (torch.randn(3, 6),), opset=opset)


class Builtin(nn.Module):
    """Its input is called like a builtin of Python, which a copied graph would rename."""

    def forward(self, input):
        return input.view(-1, 6).relu()


def test_an_input_called_after_a_builtin_keeps_its_name():
    x = torch.randn(2, 3, 2)
    program = export(Builtin(), (x,))
    changed = translatable(program)
    assert changed is not program
    assert [n.name for n in changed.graph.nodes] == [n.name for n in program.graph.nodes]
    torch.testing.assert_close(changed.module()(x), Builtin()(x))


def test_every_file_of_a_form_is_in_the_list():
    files = {f"{forms.__name__}.{found.name}" for found in pkgutil.iter_modules(forms.__path__)}
    assert {form.__module__ for form in forms.FORMS} == files
    assert len(forms.FORMS) == len(files)
