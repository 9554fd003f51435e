"""Models as nobody should write them: one line that says what is wrong, exit 2 or 3, nothing written, no traceback."""

import pytest
import torch
from click.testing import CliRunner

from pipeline.cli import main

HEAD = """
import sys
import numpy as np
import torch
from torch import nn

class Mute(Exception):
    def __str__(self):
        raise RuntimeError("no text")
    __repr__ = __str__

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 10)

    def logits(self, x):
        return self.head(self.conv(x).relu().mean((2, 3)))

    def forward(self, x):
        return self.logits(x)
"""

FORWARDS = {
    "bool": "self.logits(x) > 0",
    "integers": "self.logits(x).long()",
    "an integer": "3",
    "a float": "1.5",
    "an array": "self.logits(x).detach().numpy()",
    "sparse": "self.logits(x).to_sparse()",
    "complex": "torch.complex(self.logits(x), self.logits(x))",
    "one row": "self.logits(x).mean(0, keepdim=True)",
    "one row of a single dimension": "self.logits(x)[0]",
    "rows twice": "torch.cat([self.logits(x)] * 2)",
    "nothing": "None",
    "empty": "self.logits(x)[:0]",
    "no columns": "self.logits(x)[:, :0]",
    "an empty list": "[]",
    "an empty dict": "{}",
    "a nested list of nothing": "[[[]]]",
    "a list in itself": "(lambda l: (l.append(l), l)[1])([])",
    "text": "'logits'",
    "a set": "{1, 2}",
    "a generator": "iter([self.logits(x)])",
    "a module": "self",
    "a class": "Net",
    "on no device": "self.logits(x).to('meta')",
    "an error that says nothing": "exec('raise Mute')",
    "a huge error": "exec('raise ValueError(\"x\" * 1_000_000)')",
    "an error of escapes": "exec('raise ValueError(chr(27) + \"[2J\" + chr(0))')",
    "an assertion": "exec('assert False')",
    "recursion": "self(x)",
    "no memory": "exec('raise MemoryError')",
    "another stop": "exec('raise StopIteration')",
}

BUILDS = {
    "no super().__init__()": "class Bad(nn.Module):\n    def __init__(self):\n        self.conv = nn.Conv2d(3, 8, 3)\n"
    "def build():\n    return Bad()",
    "no super().__init__() and nothing set": "class Bad(nn.Module):\n    def __init__(self):\n        pass\n"
    "def build():\n    return Bad()",
    "sub-module without super().__init__()": "class Bad(nn.Module):\n    def __init__(self):\n        pass\n"
    "def build():\n    net = Net()\n    net.bad = Bad()\n    return net",
    "no forward": "def build():\n    net = nn.Module()\n    net.head = nn.Linear(3, 10)\n    return net",
    "an error that says nothing": "def build():\n    raise Mute",
    "a huge error": "def build():\n    raise ValueError('x' * 1_000_000)",
    "sparse parameters": "def build():\n    net = Net()\n"
    "    net.more = nn.Parameter(torch.eye(8).to_sparse())\n    return net",
    "complex parameters": "def build():\n    net = Net()\n"
    "    net.more = nn.Parameter(torch.eye(8).to(torch.complex64))\n    return net",
    "meta parameters": "def build():\n    with torch.device('meta'):\n        return Net()",
    "a meta buffer": "def build():\n    net = Net()\n    net.register_buffer('b', torch.zeros(3, device='meta'))\n"
    "    return net",
    "nothing": "def build():\n    return None",
    "the class": "def build():\n    return Net",
    "weights": "def build():\n    return Net().state_dict()",
    "repr that raises": "class Bad(Net):\n    def __repr__(self):\n        raise Mute\ndef build():\n    return Bad()",
    "extra_repr that raises": "class Bad(Net):\n    def extra_repr(self):\n        raise Mute\n"
    "def build():\n    return Bad()",
    "state_dict that raises": "class Bad(Net):\n    def state_dict(self, *a, **k):\n        raise Mute\n"
    "def build():\n    return Bad()",
    "state_dict of nonsense": "class Bad(Net):\n    def state_dict(self, *a, **k):\n        return {'a': 1}\n"
    "def build():\n    return Bad()",
    "extra state": "class Bad(Net):\n    def get_extra_state(self):\n        return {'a': object()}\n"
    "    def set_extra_state(self, state):\n        pass\ndef build():\n    return Bad()",
    "eval that raises": "class Bad(Net):\n    def eval(self):\n        raise Mute\ndef build():\n    return Bad()",
    "train that returns nothing": "class Bad(Net):\n    def train(self, mode=True):\n        pass\n"
    "def build():\n    return Bad()",
    "module in itself": "def build():\n    net = Net()\n    net.me = net\n    return net",
    "attribute that raises": "class Bad(Net):\n    def __getattr__(self, name):\n        raise Mute\n"
    "def build():\n    return Bad()",
}  # fmt: skip


def deployed(tmp_path, code: str, *words: str):
    path = tmp_path / "mine.py"
    path.write_text(HEAD + code)
    out = tmp_path / "artifacts"
    words = ("deploy", f"{path}:build", "--input-size", "3,8,8", "--until", "baseline", "--out", str(out),
             "--set", "baseline.train={epochs=1}", "--set", "baseline.seconds=0.1", *words)  # fmt: skip
    return CliRunner().invoke(main, words), out


def refused(tmp_path, code: str) -> str:
    done, out = deployed(tmp_path, code)
    assert done.exit_code in (2, 3), done.output
    assert "Traceback" not in done.output
    assert "bug in leanort" not in done.output
    assert sum(line.startswith("error:") for line in done.output.splitlines()) == 1, done.output
    assert len(done.output) < 3000
    assert "\x1b" not in done.output
    assert "\0" not in done.output
    assert not out.exists() or not list(out.rglob("*"))
    return done.output


@pytest.mark.parametrize("forward", FORWARDS.values(), ids=FORWARDS)
def test_what_a_forward_pass_should_not_return(tmp_path, forward):
    refused(
        tmp_path,
        f"class Bad(Net):\n    def forward(self, x):\n        return {forward}\ndef build():\n    return Bad()\n",
    )


@pytest.mark.parametrize("code", BUILDS.values(), ids=BUILDS)
def test_what_a_callable_should_not_build(tmp_path, code):
    refused(tmp_path, code)


@pytest.mark.parametrize("method", ["__len__", "__bool__", "__eq__", "__iter__", "__contains__", "__getitem__"])
def test_a_special_method_that_raises_does_no_harm(tmp_path, method):
    code = f"class Odd(Net):\n    def {method}(self, *a):\n        raise Mute\n"
    code += "    __hash__ = nn.Module.__hash__\n" if method == "__eq__" else ""
    done, _ = deployed(tmp_path, code + "def build():\n    return Odd()\n")
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    "where",
    [
        "torch.set_default_dtype(torch.float64)",
        "torch.set_default_device('meta')",
        "torch.set_grad_enabled(False)",
        "torch.use_deterministic_algorithms(True)",
    ],
)
@pytest.mark.parametrize("inside", [False, True])
def test_what_a_file_sets_for_the_whole_process_is_set_back(tmp_path, where, inside):
    code = f"def build():\n    {where}\n    return Net()\n" if inside else f"{where}\ndef build():\n    return Net()\n"
    try:
        done, _ = deployed(tmp_path, code)
        assert torch.get_default_dtype() == torch.float32
        assert torch.get_default_device().type == "cpu"
        assert torch.is_grad_enabled()
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
        torch.set_grad_enabled(True)
        torch.use_deterministic_algorithms(False)
    assert "Traceback" not in done.output
    assert done.exit_code in (0, 2), done.output
