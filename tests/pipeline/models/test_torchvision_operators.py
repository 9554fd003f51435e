"""`import torchvision` where it was built for another torch, in scripts that know nothing of us."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[3] / "pipeline" / "models" / "torchvision_operators.py"
DECLARED = "import torch; print(hasattr(torch.ops.torchvision, 'nms'))"


class Environment:
    """A virtual environment with the libraries of this one, but nothing that is read at its start."""

    def __init__(self, folder):
        venv.create(folder, with_pip=False)
        self.python = folder / "bin" / "python"
        vars = {"base": str(folder), "platbase": str(folder)}
        self.libraries = Path(sysconfig.get_path("purelib", vars=vars))
        (self.libraries / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
        self.folder = folder

    def run(self, script, *options, first=None):
        """Run a script from another folder; modules in the folder `first` come before all others."""
        env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        env |= {"PYTHONPATH": str(first)} if first else {}
        return subprocess.run(
            [self.python, *options, "-c", script], cwd=self.folder, env=env, capture_output=True, text=True, check=False
        )

    def put(self):
        done = subprocess.run([self.python, "-P", SOURCE], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        return {f.name: f.stat().st_mtime_ns for f in self.libraries.glob("leanort*")}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    made = Environment(tmp_path_factory.mktemp("environment"))
    made.put()
    return made


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """The same without the copy."""
    return Environment(tmp_path_factory.mktemp("bare"))


def said(done):
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()


@pytest.fixture
def torchvision_of(tmp_path):
    """A package of that name with this text and, if given, this file for its operators."""

    def make(text, operators=None):
        package = tmp_path / "first" / "torchvision"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(text)
        if operators is not None:
            (package / "_C.so").write_bytes(operators)
        return package.parent

    return make


def test_scripts_that_know_nothing_of_us_import_torchvision_and_what_needs_it(environment):
    script = """
import sys
import torchvision
print(type(torchvision.models.resnet18()).__name__, type(torchvision.__spec__.loader).__name__)
import transformers
from transformers import AutoModel, ViTImageProcessor
print(AutoModel.__name__, ViTImageProcessor.__name__)
print([name for name in sys.modules if name.split(".")[0] in ("pipeline", "exporters", "validators", "foundation")])
import torch
try:
    kept = torchvision.ops.nms(torch.tensor([[0., 0, 1, 1], [0, 0, 1, 1]]), torch.tensor([0.5, 0.9]), 0.5)
    print(kept.tolist() == [1])
except RuntimeError as error:
    print("your PyTorch and torchvision versions are incompatible" in str(error))
"""
    done = environment.run(script)
    assert said(done) == ["ResNet SourceFileLoader", "AutoModel ViTImageProcessor", "[]", "True"]
    assert done.stderr == ""


def test_a_start_reads_that_one_module_and_to_ask_for_torchvision_runs_nothing(environment, bare):
    modules = "import sys; print(*sorted(sys.modules))"
    with_it, without = (set(said(one.run(modules))[0].split()) for one in (environment, bare))
    assert with_it - without == {"leanort_torchvision_operators"}
    ask = (
        "import importlib.util, sys; print(importlib.util.find_spec('torchvision') is not None, 'torch' in sys.modules)"
    )
    assert said(environment.run(ask)) == ["True False"]


def test_put_twice_is_put_once_and_a_newer_copy_takes_its_place(tmp_path):
    one = Environment(tmp_path / "environment")
    first = one.put()
    assert set(first) == {"leanort_torchvision_operators.py", "leanort_torchvision_operators.pth"}
    assert one.put() == first
    copy = one.libraries / "leanort_torchvision_operators.py"
    copy.write_text("OLDER = True\n")
    one.put()
    assert copy.read_text() == SOURCE.read_text()


def test_no_other_python_than_that_of_an_environment_is_changed():
    script = f"import runpy, sys; sys.prefix = sys.base_prefix; runpy.run_path({str(SOURCE)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "virtual environment" in done.stderr


def test_beside_the_copy_our_own_import_adds_nothing(environment):
    script = f"""
import sys
sys.path.insert(0, {str(SOURCE.parents[2])!r})
from pipeline.models import torchvision_operators
print([type(finder).__name__ for finder in sys.meta_path].count("BeforeTorchvision"))
import torchvision
"""
    assert said(environment.run(script)) == ["1"]


def test_our_own_import_is_enough_where_there_is_no_copy(bare):
    script = f"""
import sys
sys.path.insert(0, {str(SOURCE.parents[2])!r})
from pipeline.models import torchvision_operators
print("torch" in sys.modules)
import torchvision
print(torchvision.ops.nms.__name__)
"""
    assert said(bare.run(script)) == ["False", "nms"]


def test_a_torchvision_whose_operators_load_is_left_alone(environment, torchvision_of):
    """A library that loads stands for the operators of a torchvision that was built for this torch."""
    import _bisect

    loads = Path(_bisect.__file__).read_bytes()
    assert said(environment.run("import torchvision", first=torchvision_of(DECLARED, loads))) == ["False"]


@pytest.mark.parametrize("operators", [b"no library", None], ids=["that does not load", "that is not there"])
def test_only_for_a_library(environment, torchvision_of, operators):
    first = torchvision_of(DECLARED, operators)
    assert said(environment.run(DECLARED, first=first)) == ["False"], "declared without an import of torchvision"
    assert said(environment.run("import torchvision", first=first)) == ["True"]


def test_operators_that_are_declared_already_are_left_alone(environment, torchvision_of):
    script = """
import torch
library = torch.library.Library("torchvision", "DEF")
library.define("nms(Tensor dets) -> Tensor")
import torchvision
print(hasattr(torch.ops.torchvision, "qnms"))
"""
    assert said(environment.run(script, first=torchvision_of("", b"no library"))) == ["False"]


@pytest.mark.parametrize(
    ("text", "last"),
    [
        ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("1 +", "SyntaxError: invalid syntax"),
        ("import torch\ntorch.no_such_thing", "AttributeError: module 'torch' has no attribute 'no_such_thing'"),
        ("import torch\ntorch.ops.torchvision.no_such_operator", "AttributeError: '_OpNamespace' 'torchvision' object"),
    ],
)
def test_a_broken_torchvision_says_what_it_says_without_us(environment, bare, torchvision_of, text, last):
    first = torchvision_of(text)
    ours, theirs = (one.run("import torchvision", first=first) for one in (environment, bare))
    assert ours.returncode == theirs.returncode == 1
    assert ours.stderr.strip().splitlines()[-1] == theirs.stderr.strip().splitlines()[-1]
    assert last in ours.stderr


def test_without_torch_or_torchvision_what_is_missing_is_named(tmp_path, torchvision_of):
    one = Environment(tmp_path / "environment")
    one.put()
    (one.libraries / "libraries.pth").unlink()
    assert "No module named 'torchvision'" in one.run("import torchvision").stderr
    assert said(one.run("import importlib.util; print(importlib.util.find_spec('torchvision'))")) == ["None"]
    first = torchvision_of("import torch")
    assert "No module named 'torch'" in one.run("import torchvision", first=first).stderr


def test_make_setup_puts_it_there(tmp_path):
    command = ["make", "--dry-run", "setup", f"VENV={tmp_path}"]
    lines = subprocess.run(
        command, cwd=SOURCE.parents[2], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    place = lines.index(f"{tmp_path}/bin/python -P {SOURCE.relative_to(SOURCE.parents[2])}")
    assert max(at for at, line in enumerate(lines) if " -m pip install " in line) < place
