"""What README and docs/ promise: every command in them runs, every block of Python works, every key is told.

Models that would take minutes are stood in for by a tiny one: a version of it, called resnet50, is deployed once.
"""

import inspect
import json
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import typing
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from pydantic import BaseModel
from safetensors.torch import load_file

import pipeline
from pipeline.cli import main
from pipeline.latency import probes, profile, trial
from pipeline.recipe import config
from tests.pipeline.chain import QUICK, TINY

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {page.name: page.read_text() for page in PAGES}
ALL = "\n".join(TEXT.values())
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SERVER = (ROOT / "exporters" / "serve.py").read_text()

# What the pages call things -> what stands in for it here.
STANDS_FOR = {
    "MODEL": "resnet50", "MODEL|RECIPE.toml": "resnet50", "MODEL/VERSION": "resnet50/v0001",
    "MODEL/current": "resnet50/current",
    "A": "resnet50/v0001", "B": "resnet50/v0002", "FILE.onnx": "small.onnx", "DENSE.onnx": "dense.onnx",
    "CHECKPOINT": "pruned.pt",
    "A.onnx": "model.onnx", "B.onnx": "model.quantised.onnx", "FILE.tar.gz": "packed.tar.gz", "FILE": "widths.svg",
    "layer3.1.conv2": "blocks.0.conv1",
}  # fmt: skip
MODELS = ("resnet50", "mobilenet_v2", "timm:resnet18", "mynet.py:build")
JUDGING = ("deploy", "sweep", "shrink", "gate", "check")  # exit codes 1 and 4 are verdicts


def blocks(language: str) -> list[str]:
    return [body for text in TEXT.values() for tongue, body in FENCE.findall(text) if tongue == language]


def lines(text: str) -> Iterator[str]:
    """Every command on a page: lines of plain and YAML blocks, and what stands in single quotes of code."""
    for language, body in FENCE.findall(text):
        if language in ("", "yaml"):
            for line in body.splitlines():
                for part in line.strip().removeprefix("- ").split(" && "):
                    command = re.sub(r"\s+#.*", "", part).removeprefix("leanort/.venv/bin/").strip()
                    if command.startswith(("leanort ", "make ")):
                        yield command
    for quoted in re.findall(r"`([^`]+)`", FENCE.sub("", text)):
        command = " ".join(quoted.replace("\\|", "|").split())
        if command.startswith(("leanort ", "make ")):
            yield command


def block(language: str, *words: str) -> str:
    """The one block of a language that has all these words in it."""
    (found,) = [body for body in blocks(language) if all(word in body for word in words)]
    return found


COMMANDS = list(dict.fromkeys(line for text in TEXT.values() for line in lines(text)))
LEANORT = [line for line in COMMANDS if line.startswith("leanort ")]
MAKE = [line for line in COMMANDS if line.startswith("make ")]


def words_of(line: str) -> list[str]:
    """A command's words, optional parts left out, with what stands in for the names."""
    return [STANDS_FOR.get(word, word) for word in shlex.split(re.sub(r"\s*\[[^\]]*\]", "", line))]


@pytest.fixture(scope="module", autouse=True)
def short_latency_tables() -> Iterator[None]:
    """Three models for a few turns each: what a table says is tested elsewhere, here the commands run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probes, "PROBES", 3)
        patch.setattr(profile, "SECONDS", 0.05)
        patch.setattr(trial, "SECONDS", 0.2)
        patch.setattr(trial, "RIVAL_SECONDS", 0.2)
        yield


@pytest.fixture(scope="module")
def deployed(tmp_path_factory) -> Path:
    """A folder with everything that the pages' commands name; two versions of the tiny net, both passed."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copy(TINY, folder / "mynet.py")
    (folder / "mytask.py").write_text(block("python", "def task():"))
    quick = [word for word in QUICK if word not in ("--name", "tiny")]
    for ratio in ("5.0", "4.0"):
        words = ["deploy", "mynet.py:build", *quick, "--name", "resnet50", "--set", f"gate.max_latency_ratio={ratio}"]
        assert invoke(folder, words) == 0
    version = folder / "artifacts" / "resnet50" / "v0001"
    for name in ("model.onnx", "small.onnx", "model.quantised.onnx"):
        shutil.copy(version / "5-export" / "model.onnx", folder / name)
    shutil.copy(next((version / "0-baseline").glob("*.onnx")), folder / "dense.onnx")
    shutil.copy(next((version / "0-baseline").glob("*.safetensors")), folder / "model.safetensors")
    state = load_file(folder / "model.safetensors")
    state["stem.0.weight"][:4] = 0
    torch.save(state, folder / "pruned.pt")
    draw = np.random.default_rng(0)
    for name in ("samples.npz", "test.npz"):
        x = draw.random((80, 3, 16, 16), np.float32)
        np.savez(folder / name, x=x, y=np.arange(80) % 10)
    np.savez(folder / "images.npz", x=x)
    for label in range(10):
        (folder / "photos" / str(label)).mkdir(parents=True)
        for number in range(8):
            pixels = draw.integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / str(label) / f"{number}.png")
    policy, recipe = block("toml", 'score_by = "interval"'), block("toml", 'model = "resnet50"')
    for told, stand_in in {"resnet50": "mynet.py:build", "layer4.*": "blocks.2.*", "conv1": "stem.0"}.items():
        recipe = recipe.replace(f'"{told}"', f'"{stand_in}"')
    (folder / "recipe.toml").write_text(recipe)
    for name in ("policy.toml", "strict.toml"):
        (folder / name).write_text(policy)
    assert invoke(folder, ["bundle", "resnet50", "-o", "resnet50.tar.gz"]) == 0
    assert invoke(folder, ["profile", "mynet.py:build", "--input-size", "3,16,16", "--kit", "made.tar.gz"]) == 0
    with tarfile.open(folder / "made.tar.gz") as kit:
        kit.extractall(folder, filter="data")
    subprocess.run([sys.executable, folder / "latency-kit" / "measure.py"], check=True, capture_output=True)
    shutil.copy(folder / "latency-kit" / "device.json", folder)
    return folder


@pytest.fixture
def here(deployed, tmp_path, monkeypatch) -> Path:
    """A copy of that folder, to work in."""
    folder = tmp_path / "work"
    shutil.copytree(deployed, folder, symlinks=True)
    monkeypatch.chdir(folder)
    return folder


def command(name: str) -> list[click.Parameter]:
    return main.commands[name].params


def invoke(folder: Path, words: list[str]) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = CliRunner().invoke(main, words)
    assert result.exit_code in ((0, 1, 4) if words[0] in JUDGING else (0,)), result.output
    return result.exit_code


def run(folder: Path, words: list[str]) -> None:
    """Run a command of leanort on what stands in for its model; a deploy goes as far as its second stage.

    A command without the arguments that it needs is only mentioned, not shown, and not run.
    """
    name, *rest = words
    optional = ("deploy", "plan", "profile", "sensitivity", "sweep")  # a recipe may stand for their model
    needs = name in optional or any(isinstance(p, click.Argument) and p.required for p in command(name))
    if needs and not rest:
        return
    if name == "shrink":
        rest = ["mynet.py:build" if word in MODELS else word for word in rest]
        rest += ["--name", "shrunk", "--input-size", "3,16,16", *QUICK[QUICK.index("--set") + 4 :]]
    if name in optional and "--help" not in rest:
        own_size = "--input-size" in rest or any(word.endswith(".toml") for word in rest)
        rest = ["mynet.py:build" if word in MODELS else word for word in rest]
        rest += ["--name", "resnet50", *([] if own_size else ["--input-size", "3,16,16"])]
        if name == "sweep":  # one point: what a list gives is tested elsewhere
            rest[rest.index("--latency") : rest.index("--latency") + 2] = ["--macs", "0.6"]
            rest += [*QUICK[QUICK.index("--set") :], "--quiet"]
        for asked in ("--latency", "--size"):  # a tiny net hardly gets faster, and has less than a page asks for
            if asked in rest:
                rest[rest.index(asked) + 1] = "0.97"
        if name in ("deploy", "sensitivity"):
            first = QUICK.index("--set")
            rest += QUICK[first : first + 4]  # both settings of the baseline
        if name == "deploy":
            rest += ["--until", "prune", "--quiet"]
    if (name == "gate" and any(word.endswith(".onnx") for word in rest)) or name == "check":
        rest += ["--seconds", "0.2"]
    if name == "bundle" and "--check" not in rest:
        Path(rest[rest.index("-o") + 1]).unlink(missing_ok=True)
    invoke(folder, [name, *rest])


@pytest.mark.examples
@pytest.mark.parametrize("line", LEANORT)
def test_every_leanort_command_runs(line, here):
    known = {option for one in command(line.split()[1]) for option in one.opts} | {"--help"}
    assert set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", re.sub(r'"[^"]*"', "", line))) <= known
    run(here, words_of(line)[1:])


@pytest.mark.examples
@pytest.mark.parametrize("line", MAKE)
def test_every_make_command_has_its_target_and_runs_what_is_there(line, here):
    words = [word for word in words_of(line) if word not in ("-C", "leanort")]
    done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for script in re.findall(r"\S+\.py\b", done.stdout.replace("mynet.py:build", "")):
        assert (ROOT / script).is_file(), script
    for shown in done.stdout.splitlines():
        _, found, rest = shown.partition("/bin/leanort ")
        if found:
            run(here, shlex.split(rest))


def test_the_pages_show_commands_at_all():
    assert len(LEANORT) > 30
    assert len(MAKE) > 20
    assert len(blocks("python")) == 7


def test_python_that_deploys(deployed, monkeypatch):
    code = block("python", "pipeline.deploy(")
    signature = inspect.signature(pipeline.deploy)

    def answered(*args: object, **kwargs: object) -> pipeline.Release:
        assert signature.bind(*args, **kwargs).arguments["config"].name == "mynet"
        return pipeline.open_release(deployed / "artifacts" / "resnet50" / "v0001")

    monkeypatch.setattr(pipeline, "deploy", answered)
    *statements, last = code.strip().splitlines()
    names: dict[str, object] = {"model": torch.nn.Identity(), "train_set": None, "test_set": None}
    exec("\n".join(statements), names)
    passed, ratio, params, folder = eval(last, names)
    assert passed
    assert 0 < ratio < 5
    assert params > 0
    assert folder.name == "v0001"
    pipeline.TerminalProgress()


def test_python_that_compares_two_files(here, capsys):
    code = block("python", "random_feeds")
    exec(code, {})
    assert capsys.readouterr().out.startswith("True ")


def test_python_that_shrinks_what_somebody_else_pruned(here):
    code = block("python", "Ledger.from_json")
    names: dict[str, object] = {}
    exec((here / "mynet.py").read_text(), names)
    model = names["TinyNet"]().eval()
    with torch.no_grad():
        for tensor in (model.blocks[0].bn1.weight, model.blocks[0].bn1.bias):
            tensor[:8] = 0
    names |= {"model": model, "example": torch.randn(2, 3, 16, 16)}
    exec(code.replace("layer3.1.conv2", STANDS_FOR["layer3.1.conv2"]), names)
    assert names["again"]["blocks.0.conv1.weight"].shape[0] == 24
    assert names["dense"]["blocks.0.conv1.weight"].shape[0] == 32


def test_python_that_trains_the_smaller_module_elsewhere(here):
    code = block("python", "pipeline.smaller(")
    names = {"pipeline": pipeline, "torch": torch, "example": torch.randn(2, 3, 16, 16)}
    names["release"] = pipeline.open_release(here / "artifacts" / "resnet50" / "v0001")
    exec(code, names)
    assert Path("mine.onnx").is_file()
    assert {path.name for path in Path("small").iterdir()} == {"model.safetensors", "structure.json"}
    assert type(names["again"]) is type(names["small"])
    assert torch.equal(names["again"](names["example"]), names["small"](names["example"]))


def test_a_loop_of_ones_own_as_the_page_shows_it_trains(here):
    (here / "own_loop.py").write_text(block("python", "def fit("))
    (here / "own.toml").write_text('model = "mynet.py:build"\n' + block("toml", "own_loop.py:fit"))
    first = QUICK.index("--set")
    words = ["--name", "own", "--input-size", "3,16,16", *QUICK[first : first + 4], "--set", "finetune.epochs=1"]
    assert invoke(here, ["deploy", "own.toml", *words, "--until", "finetune"]) == 0
    (made,) = (here / "artifacts" / "own").rglob("2-finetune/artifact.json")
    assert json.loads(made.read_text())["rungs"][-1]["why"].startswith("by own_loop.py:fit; ")


def test_a_block_of_python_is_the_server_which_the_bundles_tests_run():
    assert SERVER in blocks("python")


def test_recipes_and_policies_are_valid(tmp_path):
    policy, recipe = block("toml", 'score_by = "interval"'), block("toml", 'model = "resnet50"')
    assert len(blocks("toml")) == 3  # and that of an own loop, which is run
    (tmp_path / "recipe.toml").write_text(recipe)
    assert config.load(tmp_path / "recipe.toml").prune.overrides == {"layer4.*": 0.6, "conv1": 0.0}
    (tmp_path / "policy.toml").write_text(policy)
    assert config.load_policy(tmp_path / "policy.toml").limits[1].metric == "peak_memory"


def section(annotation: object) -> type[BaseModel] | None:
    """The part of the recipe that a key's type holds, whether alone, optional or in a list."""
    inner = [part for one in typing.get_args(annotation) for part in (one, *typing.get_args(one))]
    return next((o for o in (annotation, *inner) if isinstance(o, type) and issubclass(o, BaseModel)), None)


def keys(part: type[BaseModel], before: str = "") -> Iterator[tuple[str, object]]:
    """Every key with its default; the training settings, which three sections have, once, as `train.KEY`."""
    for name, field in part.model_fields.items():
        inside = section(field.annotation)
        if inside is None or name in ("train", "limits"):
            yield before + name, None if field.is_required() else field.get_default(call_default_factory=True)
        if inside is not None:
            yield from keys(inside, "train." if name == "train" else f"{before}{name}.")


def test_every_key_of_the_recipe_is_told_with_its_default_and_none_that_is_gone():
    rows = dict(re.findall(r"^\| `([\w.]+)` \| ([^|]*) \|", TEXT["recipe.md"], re.MULTILINE))
    known = dict(keys(config.Config))
    assert set(known) - set(rows) == set(), "docs/recipe.md lacks these keys"
    assert set(rows) - set(known) == set(), "docs/recipe.md tells of keys that are gone"
    wrong = {}
    for key, value in known.items():
        shown = rows[key].strip().strip("`").strip('"')
        plain = str(list(value) if isinstance(value, tuple) else value).replace("'", '"').replace("1e-05", "1e-5")
        told = {"True": "true", "False": "false", "None": ""}.get(plain, plain)
        if shown != told and shown != "required":
            wrong[key] = f"docs/recipe.md says {shown!r}, the default is {told!r}"
    assert wrong == {}


def test_every_command_and_every_make_target_appears():
    shown = {line.split()[1] for line in LEANORT}
    assert set(main.commands) - shown == set(), "commands that no page shows"
    targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    named = {word for line in MAKE for word in line.split()[1:]}
    assert set(targets) - named == set(), "make targets that no page shows"


def test_the_readme_is_a_newcomers_page():
    assert len(TEXT["README.md"].splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target.partition("#")[0]).is_file(), target


def test_the_readme_leads_to_every_page_of_the_docs():
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in TEXT["README.md"], page.name
