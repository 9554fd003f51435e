"""The stored program: read back as it was, and refused before anything that its file asks for is run."""

import contextlib
import io
import json
import logging
import pickle
import zipfile
from pathlib import Path

import pytest
import sympy
import torch
from torch import nn
from torch.utils._sympy.value_ranges import ValueRanges

from foundation.errors import StoreError
from pipeline.artifacts import archive

X = torch.randn(2, 3, 8, 8)


@pytest.fixture
def path(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    program = torch.export.export(model, (X,), dynamic_shapes=({0: torch.export.Dim("n")},))
    archive.write(program, tmp_path / "shrunk.pt2")
    (tmp_path / "expected").write_bytes(b"")
    torch.save(model(X[:1]), tmp_path / "expected")
    return tmp_path / "shrunk.pt2"


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as file:
        return {name: file.read(name) for name in file.namelist()}


def rewrite(path: Path, content: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in content.items():
            file.writestr(name, data)


def graph(path: Path, change) -> None:
    """Change the graph's JSON in place."""
    content = members(path)
    (name,) = [name for name in content if name.endswith("models/model.json")]
    model = json.loads(content[name])
    change(model)
    content[name] = json.dumps(model).encode()
    rewrite(path, content)


def config(path: Path, change) -> None:
    content = members(path)
    (name,) = [name for name in content if name.endswith("model_weights_config.json")]
    made = json.loads(content[name])
    change(made["config"])
    content[name] = json.dumps(made).encode()
    rewrite(path, content)


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def evil() -> bytes:
    buffer = io.BytesIO()
    torch.save(Evil(), buffer)
    return buffer.getvalue()


def test_a_program_comes_back_as_it_was_at_any_batch_size(path):
    program = archive.read(path)
    assert archive.faults(path) == []
    assert torch.equal(program.module()(X[:1]), torch.load(path.with_name("expected")))


def test_the_range_of_a_size_that_is_gone_is_read_back_without_a_word(tmp_path):
    program = torch.export.export(nn.Linear(2, 1), (torch.ones(3, 2),))
    program.range_constraints[sympy.Symbol("u7", integer=True)] = ValueRanges(2, 5)
    archive.write(program, tmp_path / "picked.pt2")
    logger, said = logging.getLogger("torch._export.serde.serialize"), []
    handler = logging.Handler()
    handler.emit = said.append
    logger.addHandler(handler)
    try:
        program = archive.read(tmp_path / "picked.pt2")
        logger.warning("heard")
    finally:
        logger.removeHandler(handler)
    assert [record.msg for record in said] == ["heard"]
    assert program.module()(torch.ones(3, 2)).shape == (3, 1)


def test_the_same_program_gives_the_same_bytes(path):
    before = path.read_bytes()
    archive.write(archive.read(path), path)
    archive.write(archive.read(path), path.with_name("again.pt2"))
    assert path.read_bytes() == path.with_name("again.pt2").read_bytes()
    assert len(before) > 1000


CODE = "__import__('pathlib').Path('ran').touch()"


def a_pickled_weight(path):
    config(path, lambda made: next(iter(made.values())).update(use_pickle=True))
    content = members(path)
    name = next(name for name in content if name.endswith("weights/weight_0"))
    rewrite(path, content | {name: evil()})


def a_pickled_sample(path):
    content = members(path)
    rewrite(path, {name: evil() if "sample_inputs" in name else data for name, data in content.items()})


def a_legacy_weights_file(path):
    content = members(path)
    top = next(iter(content)).partition("/")[0]
    rewrite(path, content | {f"{top}/data/weights/model.pt": evil()})


def compiled_code(path):
    content = members(path)
    top = next(iter(content)).partition("/")[0]
    rewrite(path, content | {f"{top}/data/aotinductor/model/x.so": b"\x7fELF"})


def an_opaque_constant(path):
    content = members(path)
    top = next(iter(content)).partition("/")[0]
    made = {"config": {"x": {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": False, "tensor_meta": None}}}
    name = f"{top}/data/constants/model_constants_config.json"
    rewrite(
        path, content | {name: json.dumps(made).encode(), f"{top}/data/constants/opaque_obj_0": pickle.dumps(Evil())}
    )


def a_size_that_is_code(path):
    def change(model):
        values = model["graph_module"]["graph"]["tensor_values"]
        sizes = next(v["sizes"] for v in values.values() if v["sizes"] and "as_expr" in v["sizes"][0])
        sizes[0]["as_expr"]["expr_str"] = CODE

    graph(path, change)


def a_size_that_is_code_without_quotes(path):
    code = "exec(" + "+".join(f"chr({ord(letter)})" for letter in CODE) + ")"

    def change(model):
        values = model["graph_module"]["graph"]["tensor_values"]
        sizes = next(v["sizes"] for v in values.values() if v["sizes"] and "as_expr" in v["sizes"][0])
        sizes[0]["as_expr"]["expr_str"] = code

    graph(path, change)


def an_operator_that_is_none(path):
    graph(path, lambda model: model["graph_module"]["graph"]["nodes"][0].update(target="torch.os.system"))


def a_method_call(path):
    graph(path, lambda model: model["graph_module"]["graph"]["nodes"][0].update(target="_operator.methodcaller"))


def guards(path):
    graph(path, lambda model: model.update(guards_code=[CODE]))


def an_input_whose_name_is_code(path):
    def change(model):
        name = f"x={CODE}"
        model["graph_module"]["graph"]["inputs"][-1]["as_tensor"]["name"] = name

    graph(path, change)


def a_value_whose_name_is_code(path):
    def change(model):
        values = model["graph_module"]["graph"]["tensor_values"]
        values[CODE] = next(iter(values.values()))

    graph(path, change)


def a_container_that_imports(path):
    def change(model):
        signature = model["graph_module"]["module_call_graph"][0]["signature"]
        context = json.dumps(
            {"default_factory_module": "antigravity", "default_factory_name": "fly", "dict_context": []}
        )
        signature["in_spec"] = json.dumps(
            [1, {"type": "collections.defaultdict", "context": context, "children_spec": []}]
        )

    graph(path, change)


def an_enumeration_that_imports(path):
    def change(model):
        signature = model["graph_module"]["module_call_graph"][0]["signature"]
        context = json.dumps([{"__enum__": True, "fqn": "antigravity:fly", "name": "x"}])
        signature["in_spec"] = json.dumps([1, {"type": "builtins.dict", "context": context, "children_spec": []}])

    graph(path, change)


def a_compressed_member(path):
    rewrite(path, members(path), zipfile.ZIP_DEFLATED)


def a_member_twice(path):
    with zipfile.ZipFile(path, "a") as file, pytest.warns(UserWarning):
        file.writestr(file.namelist()[0], b"other")


def a_member_that_climbs(path):
    rewrite(path, members(path) | {"../../x": b""})


def no_archive(path):
    path.write_bytes(pickle.dumps(Evil()))


def nesting_without_end(path):
    content = members(path)
    (name,) = [name for name in content if name.endswith("models/model.json")]
    rewrite(path, content | {name: b"[" * 100_000})


ATTACKS = [
    a_pickled_weight, a_pickled_sample, a_legacy_weights_file, compiled_code, an_opaque_constant, a_size_that_is_code,
    a_size_that_is_code_without_quotes, an_operator_that_is_none, a_method_call, guards, an_input_whose_name_is_code,
    a_value_whose_name_is_code, a_container_that_imports, an_enumeration_that_imports, a_compressed_member,
    a_member_twice, a_member_that_climbs, no_archive, nesting_without_end,
]  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_could_run_is_refused_before_it_does(path, attack, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    attack(path)
    assert archive.faults(path)
    with pytest.raises(StoreError, match="is not loaded"):
        archive.read(path)
    assert not Path("ran").exists()


@pytest.mark.parametrize("attack", [a_pickled_weight, a_pickled_sample, a_size_that_is_code])
def test_these_attacks_work_on_torch_itself(path, attack, tmp_path, monkeypatch):
    """Else the tests above would prove nothing."""
    monkeypatch.chdir(tmp_path)
    attack(path)
    with contextlib.suppress(Exception):
        torch.export.load(path)
    assert Path("ran").exists()
