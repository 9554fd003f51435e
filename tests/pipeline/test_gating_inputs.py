"""What `check` feeds two models with: each planted difference is seen, whatever input it hides behind."""

import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from pipeline.cli import main
from validators import structure

DRAW = np.random.default_rng(3)
LIMITS = "max_latency_ratio = inf\nmax_size_ratio = inf\nmax_accuracy_drop_points = inf\n"
FLOAT, INT64, UINT8 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.UINT8


@pytest.fixture(autouse=True)
def cold_start(monkeypatch):
    """Memory and cold start as data: no process is started for either model, since inputs are what is tested here."""
    fresh = {"idle_rss": 1 << 20, "peak_rss": 2 << 20, "cold_load_ms": 1.0, "cold_first_ms": 1.0}
    monkeypatch.setattr(structure, "_fresh_process", lambda *given: fresh)


def weights(*shape: int) -> np.ndarray:
    return (0.2 * DRAW.standard_normal(shape)).astype(np.float32)


TABLE, MATRIX = weights(1000, 16), weights(16, 4)


def save(path: Path, nodes, inputs, outputs, **tensors) -> Path:
    graph = helper.make_graph(
        [helper.make_node(*node[:3], **(node[3] if len(node) > 3 else {})) for node in nodes],
        "g",
        [helper.make_tensor_value_info(*one) for one in inputs],
        [helper.make_tensor_value_info(*one) for one in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def text(path: Path, table: np.ndarray = TABLE, before=(), length: int | str = 12, **tensors) -> Path:
    """The mean of the words' vectors, times a matrix."""
    last = before[-1][2][0] if before else "ids"
    return save(
        path,
        [
            *before,
            ("Gather", ["table", last], ["words"]),
            ("ReduceMean", ["words", "axis"], ["mean"], {"keepdims": 0}),
            ("MatMul", ["mean", "matrix"], ["y"]),
        ],
        [("ids", INT64, ["batch", length])],
        [("y", FLOAT, ["batch", 4])],
        table=table, axis=np.array([1]), matrix=MATRIX, **tensors,
    )  # fmt: skip


def dense(path: Path, before=(), source: str = "x", batch: int | str = "batch", extra=(), **tensors) -> Path:
    """A matrix times what `before` makes of x."""
    return save(
        path,
        [*before, ("MatMul", [source, "matrix"], ["y"])],
        [("x", FLOAT, [batch, 16]), *extra],
        [("y", FLOAT, [batch, 4])],
        matrix=MATRIX, **tensors,
    )  # fmt: skip


def at_batch(path: Path, size: int) -> Path:
    """Right at every batch size but one."""
    return dense(
        path,
        [
            ("Shape", ["x"], ["shape"]), ("Gather", ["shape", "zero"], ["count"]),
            ("Equal", ["count", "size"], ["hit"]), ("Cast", ["hit"], ["number"], {"to": FLOAT}),
            ("Mul", ["number", "much"], ["off"]), ("Add", ["x", "off"], ["z"]),
        ],
        "z", zero=np.int64(0), size=np.int64(size), much=np.float32(0.5),
    )  # fmt: skip


def check(a: Path, b: Path, *words: object, code: int) -> str:
    result = CliRunner().invoke(main, [str(word) for word in ("check", a, b, "--seconds", 0.05, *words)])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


@pytest.mark.parametrize("row", [0, 2, 517, 999])
def test_each_row_of_a_table_is_reached(tmp_path, row):
    other = TABLE.copy()
    other[row] += 0.1
    a, b = text(tmp_path / "a.onnx"), text(tmp_path / "b.onnx", other)
    assert "Parity a.onnx - b.onnx" in check(a, b, code=1)
    assert "ids 0 to 999 (a table of 1000 rows)" in check(a, a, code=0)


def test_a_row_that_only_the_last_of_many_feeds_reaches(tmp_path):
    table = weights(50_000, 16)
    other = table.copy()
    other[DRAW.integers(50_000)] += 0.5
    check(text(tmp_path / "a.onnx", table, length=2), text(tmp_path / "b.onnx", other, length=2), code=1)


def test_ids_that_are_shifted_and_reshaped_stay_in_the_table(tmp_path):
    before = [
        ("Cast", ["ids"], ["short"], {"to": TensorProto.INT32}), ("Transpose", ["short"], ["turned"], {"perm": [1, 0]}),
        ("Transpose", ["turned"], ["back"], {"perm": [1, 0]}), ("Add", ["back", "two"], ["later"]),
    ]  # fmt: skip
    a = text(tmp_path / "a.onnx", before=before, two=np.int32(2))
    assert "ids 0 to 997" in check(a, a, code=0)
    other = TABLE.copy()
    other[999] += 0.1
    check(a, text(tmp_path / "b.onnx", other, before=before, two=np.int32(2)), code=1)


def test_a_clip_of_the_ids_that_is_missing_is_seen(tmp_path):
    clip = [("Clip", ["ids", "low", "high"], ["inside"])]
    a = text(tmp_path / "a.onnx", before=clip, low=np.int64(0), high=np.int64(999))
    check(a, a, code=0)
    check(a, text(tmp_path / "b.onnx"), code=1)


def test_one_token_type_is_equal_to_itself(tmp_path):
    a = text(tmp_path / "a.onnx", TABLE[:1])
    check(a, a, code=0)


def test_a_one_hot_made_by_hand_and_indices_that_come_as_floats_are_tables(tmp_path):
    def by_hand(name: str, matrix: np.ndarray) -> Path:
        return save(
            tmp_path / name,
            [
                ("Unsqueeze", ["ids", "last"], ["column"]), ("Equal", ["column", "numbers"], ["hit"]),
                ("Cast", ["hit"], ["hot"], {"to": FLOAT}), ("MatMul", ["hot", "matrix"], ["y"]),
            ],
            [("ids", INT64, ["batch"])], [("y", FLOAT, ["batch", 4])],
            last=np.array([1]), numbers=np.arange(900), matrix=matrix,
        )  # fmt: skip

    def as_floats(name: str, matrix: np.ndarray) -> Path:
        return save(
            tmp_path / name,
            [("Cast", ["ids"], ["whole"], {"to": INT64}), ("Gather", ["matrix", "whole"], ["y"])],
            [("ids", FLOAT, ["batch"])], [("y", FLOAT, ["batch", 4])], matrix=matrix,
        )  # fmt: skip

    one = weights(900, 4)
    two = one.copy()
    two[611] += 0.1
    for model in (by_hand, as_floats):
        a = model("a.onnx", one)
        check(a, a, code=0)
        check(a, model("b.onnx", two), code=1)


def test_one_hot_is_a_table(tmp_path):
    def model(name: str, matrix: np.ndarray) -> Path:
        return save(
            tmp_path / name,
            [("OneHot", ["ids", "depth", "values"], ["hot"]), ("MatMul", ["hot", "matrix"], ["y"])],
            [("ids", INT64, ["batch"])], [("y", FLOAT, ["batch", 4])],
            depth=np.int64(300), values=np.array([0, 1], np.float32), matrix=matrix,
        )  # fmt: skip

    one = weights(300, 4)
    two = one.copy()
    two[250] += 0.1
    a = model("a.onnx", one)
    check(a, a, code=0)
    check(a, model("b.onnx", two), code=1)


@pytest.mark.parametrize(
    ("kind", "clip"), [(TensorProto.UINT8, 2), (TensorProto.UINT8, 250), (TensorProto.INT16, 9999)]
)
def test_small_types_are_tried_over_their_whole_range(tmp_path, kind, clip):
    def model(name: str, *more) -> Path:
        return save(
            tmp_path / name,
            [("Cast", ["x"], ["f"], {"to": FLOAT}), *more, ("MatMul", ["s" if more else "f", "matrix"], ["y"])],
            [("x", kind, ["batch", 16])], [("y", FLOAT, ["batch", 4])],
            matrix=MATRIX, low=np.float32(-99999), high=np.float32(clip),
        )  # fmt: skip

    a, b = model("a.onnx"), model("b.onnx", ("Clip", ["f", "low", "high"], ["s"]))
    check(a, a, code=0)
    check(a, b, code=1)


def masked(path: Path, name: str, factor: float = -1e4, table: np.ndarray = TABLE) -> Path:
    """Words weighted by a softmax that a mask is added to, as BERT's scores are."""
    return save(
        path,
        [
            ("Gather", ["table", "ids"], ["words"]), ("MatMul", ["words", "column"], ["scores"]),
            ("Cast", [name], ["f"], {"to": FLOAT}), ("Sub", ["one", "f"], ["off"]),
            ("Mul", ["off", "factor"], ["drowned"]),
            ("Unsqueeze", ["drowned", "last"], ["added"]), ("Add", ["scores", "added"], ["sum"]),
            ("Softmax", ["sum"], ["share"], {"axis": 1}), ("Mul", ["words", "share"], ["weighted"]),
            ("ReduceSum", ["weighted", "axis"], ["y"], {"keepdims": 0}),
        ],
        [("ids", INT64, ["batch", 12]), (name, INT64, ["batch", 12])], [("y", FLOAT, ["batch", 16])],
        table=table, column=MATRIX[:, :1], one=np.float32(1),
        factor=np.float32(factor), last=np.array([2]), axis=np.array([1]),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["attention_mask", "input_2"])
def test_masks_need_no_option_and_are_0_and_1(tmp_path, name):
    a = masked(tmp_path / "a.onnx", name)
    b = masked(tmp_path / "b.onnx", name, factor=-2e4)  # another number that drowns
    assert f"{name} 0 to 1" in check(a, b, code=0)
    other = TABLE.copy()
    other[77] += 0.1
    check(a, masked(tmp_path / "c.onnx", name, table=other), code=1)


def numbers(path: Path, before, **tensors) -> Path:
    """An int64 input that is no index and no mask: an age, say."""
    return save(
        path,
        [("Cast", ["age"], ["f"], {"to": FLOAT}), *before, ("MatMul", ["z" if before else "f", "matrix"], ["y"])],
        [("age", INT64, ["batch", 16])], [("y", FLOAT, ["batch", 4])], matrix=MATRIX, **tensors,
    )  # fmt: skip


def test_an_unknown_range_is_said_and_does_not_pass(tmp_path):
    a = numbers(tmp_path / "a.onnx", [])
    b = numbers(tmp_path / "b.onnx", [("Min", ["f", "most"], ["z"])], most=np.float32(1e12))
    said = check(a, b, code=1)
    assert "the range of the integer input age cannot be read off a.onnx" in said
    assert "--range age=LOW:HIGH" in said
    assert ".." not in said.replace("...", "")
    check(a, a, code=0)  # the same bytes, whatever the range
    assert "age 0 to 120 (the range that was given)" in check(a, b, "--range", "age=0:120", code=0)
    np.savez(tmp_path / "real.npz", age=DRAW.permutation(np.arange(160) % 120).reshape(10, 16))
    assert "age 0 to 119 (what the given inputs hold)" in check(a, b, "--inputs", tmp_path / "real.npz", code=0)
    c = numbers(tmp_path / "c.onnx", [("Min", ["f", "most"], ["z"])], most=np.float32(100))
    check(a, c, "--range", "age=0:99", code=0)
    check(a, c, "--range", "age=0:120", code=1)
    check(a, c, code=1)


@pytest.mark.parametrize("size", [2, 5, 16, 40, 64])
def test_a_candidate_that_is_wrong_at_one_batch_size_alone(tmp_path, size):
    a = dense(tmp_path / "a.onnx")
    said = check(a, at_batch(tmp_path / "b.onnx", size), code=1)
    assert f"random, batch {size}" in said


def test_a_batch_that_only_the_candidate_fixes_is_not_equal(tmp_path):
    a, b = dense(tmp_path / "a.onnx"), dense(tmp_path / "b.onnx", batch=1)
    said = check(a, b, code=1)
    assert "its batch is fixed to 1 in b.onnx and free (batch) in a.onnx" in said
    assert "batch 1 only, as --size says" in check(a, b, "--size", "batch=1", code=0)
    check(b, a, code=0)  # it takes what the reference takes, and more


def test_other_dynamic_dimensions_are_tried_at_several_sizes(tmp_path):
    def model(name: str, bad: int) -> Path:
        return text(
            tmp_path / name, length="sequence", before=[
                ("Shape", ["ids"], ["shape"]), ("Gather", ["shape", "at"], ["long"]),
                ("Equal", ["long", "bad"], ["hit"]), ("Cast", ["hit"], ["shift"], {"to": INT64}),
                ("Sub", ["ids", "shift"], ["less"]), ("Abs", ["less"], ["new"]),
            ], at=np.int64(1), bad=np.int64(bad),
        )  # fmt: skip

    a = text(tmp_path / "a.onnx", length="sequence")
    assert "batch 1 to 64; sequence 1 to 64;" in check(a, a, code=0)
    check(a, model("never.onnx", 10_000), code=0)
    for size in (1, 16, 33, 64):
        check(a, model("bad.onnx", size), code=1)
    bad = model("bad.onnx", 20)
    said = check(a, bad, "--size", "sequence=9,11", code=0)
    assert "sequence 9, 11 only, as --size says" in said
    check(a, bad, "--size", "sequence=9,20", code=1)


LOG = (("Log", ["x"], ["l"]),)


def test_nan_outside_of_a_domain_is_no_difference_but_on_real_inputs_it_is(tmp_path):
    a = dense(tmp_path / "a.onnx", LOG, "l")
    check(a, a, code=0)
    shifted = (("Mul", ["x", "more"], ["z"]), ("Log", ["z"], ["l"]))
    check(a, dense(tmp_path / "b.onnx", shifted, "l", more=np.float32(1.01)), code=1)
    np.savez(tmp_path / "good.npz", x=DRAW.random((3, 16)) + 0.1)
    np.savez(tmp_path / "bad.npz", x=-np.ones((3, 16)))
    check(a, a, "--inputs", tmp_path / "good.npz", code=0)
    assert "inputs bad.npz: y: 12 NaN in the reference" in check(a, a, "--inputs", tmp_path / "bad.npz", code=1)


def test_a_nan_that_only_the_candidate_makes_fails(tmp_path):
    a = dense(tmp_path / "a.onnx", (("Max", ["x", "low"], ["up"]), ("Log", ["up"], ["l"])), "l", low=np.float32(1e-3))
    assert "NaN in the candidate" in check(a, dense(tmp_path / "b.onnx", LOG, "l"), code=1)


def test_a_model_that_is_never_finite_does_not_pass(tmp_path):
    before = (("Sub", ["x", "x"], ["n"]), ("Div", ["n", "n"], ["nan"]))
    a = dense(tmp_path / "a.onnx", before, "nan")
    assert "never finite on the made-up inputs" in check(a, a, code=1)


def test_a_difference_at_one_batch_size_behind_a_logarithm(tmp_path):
    a = dense(tmp_path / "a.onnx", LOG, "l")
    model = onnx.load(at_batch(tmp_path / "b.onnx", 37))
    model.graph.node[-1].input[0] = "l"
    model.graph.node.insert(6, helper.make_node("Log", ["z"], ["l"]))
    onnx.save(model, tmp_path / "b.onnx")
    check(a, tmp_path / "b.onnx", code=1)


def test_a_scalar_input(tmp_path):
    scaled = (("Mul", ["x", "t"], ["m"]),)
    extra = (("t", FLOAT, []),)
    a = save(
        tmp_path / "a.onnx", [*scaled, ("MatMul", ["m", "matrix"], ["y"])],
        [*extra, ("x", FLOAT, ["batch", 16])], [("y", FLOAT, ["batch", 4])], matrix=MATRIX,
    )  # fmt: skip
    check(a, a, code=0)


def test_the_seed_is_said_and_can_be_given(tmp_path):
    a = dense(tmp_path / "a.onnx")
    assert "seed 5" in check(a, a, "--seed", 5, code=0)
    one, two = check(a, a, code=0), check(a, a, code=0)
    assert one.partition("seed ")[2].split()[0] == two.partition("seed ")[2].split()[0]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--range", "x"), "is not NAME=LOW:HIGH"),
        (("--range", "x=1"), "is not NAME=LOW:HIGH"),
        (("--range", "x=5:1"), "is not NAME=LOW:HIGH"),
        (("--range", "x=nan:1"), "is not NAME=LOW:HIGH"),
        (("--range", f"x=0:{'9' * 5000}"), "is not NAME=LOW:HIGH"),
        (("--range", "z=0:1"), "no such input"),
        (("--size", "x=²"), "is not NAME=NUMBER"),
        (("--size", "seq=5"), "no input has such a dimension"),
        (("--size", f"batch={'9' * 5000}"), "is not NAME=NUMBER"),
        (("--inputs", "none.npz"), "no file none.npz"),
        (("--inputs", "text.npz"), "cannot be read as .npz"),
        (("--inputs", "pickled.npz"), "cannot be read as .npz"),
        (("--inputs", "other.npz"), "holds z; the model takes x"),
        (("--inputs", "wide.npz"), "has the shape (2, 17)"),
        (("--inputs", "whole.npz"), "holds int64; the model takes float32"),
    ],
)
def test_what_is_given_wrongly_is_one_line(tmp_path, monkeypatch, words, why):
    monkeypatch.chdir(tmp_path)
    a = dense(tmp_path / "a.onnx")
    (tmp_path / "text.npz").write_text("no zip")
    np.savez(tmp_path / "pickled.npz", x=np.array([{}, {}], dtype=object))
    np.savez(tmp_path / "other.npz", z=np.zeros((2, 16), np.float32))
    np.savez(tmp_path / "wide.npz", x=np.zeros((2, 17), np.float32))
    np.savez(tmp_path / "whole.npz", x=np.zeros((2, 16), np.int64))
    assert why in check(a, a, *words, code=2)


def test_names_of_files_keep_their_underscores(tmp_path):
    a = dense(tmp_path / "my_model_v2.onnx")
    assert "Parity my_model_v2.onnx - my_model_v2.onnx" in check(a, a, code=0)


def test_equal_to_is_as_strict(tmp_path):
    (tmp_path / "policy.toml").write_text(LIMITS)
    other = TABLE.copy()
    other[700] += 0.1
    a, b = text(tmp_path / "a.onnx"), text(tmp_path / "b.onnx", other)
    words = ("gate", b, "--against", a, "--equal-to", a, "--policy", tmp_path / "policy.toml", "--seconds", 0.05)
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 1, result.output
    assert "Parity a.onnx - b.onnx" in " ".join(result.output.split())


def answered(path: Path, number: int) -> Path:
    """Class numbers above a large one, as timestamps are."""
    return save(
        path,
        [
            ("MatMul", ["x", "matrix"], ["logits"]),
            ("ArgMax", ["logits"], ["best"], {"axis": 1, "keepdims": 0}),
            ("Add", ["best", "base"], ["ids"]),
        ],
        [("x", FLOAT, ["batch", 16])], [("ids", INT64, ["batch"])], matrix=MATRIX, base=np.array([number]),
    )  # fmt: skip


def test_whole_numbers_that_differ_by_little_of_their_size_fail(tmp_path):
    a, b = answered(tmp_path / "a.onnx", 1_000_000), answered(tmp_path / "b.onnx", 1_000_001)
    told = CliRunner().invoke(main, ["check", str(a), str(b), "--seconds", "0.05"])
    assert told.exit_code == 1, told.output
    assert "elements differ by up to 1, allowed 0" in told.output
    same = CliRunner().invoke(main, ["check", str(a), str(a), "--seconds", "0.05"])
    assert same.exit_code == 0, same.output


def test_where_the_search_for_the_first_difference_breaks_off_what_was_measured_stands(tmp_path, monkeypatch):
    a, b = text(tmp_path / "a.onnx"), text(tmp_path / "b.onnx", TABLE + 1)

    def breaks(*given, **more):
        raise AttributeError("'list' object has no attribute 'shape'")

    monkeypatch.setattr("pipeline.gate.foreign.first_divergence", breaks)
    told = CliRunner().invoke(main, ["check", str(a), str(b), "--seconds", "0.05"])
    assert told.exit_code == 1
    assert "could not be measured" not in told.output
    assert "where they part could not be found: 'list' object" in told.output
    assert "elements differ" in told.output


@pytest.mark.parametrize("damage", ["deflated", "text"])
def test_inputs_that_cannot_be_read_are_the_users_fault(tmp_path, damage):
    model, given = text(tmp_path / "a.onnx"), tmp_path / "inputs.npz"
    if damage == "text":
        with zipfile.ZipFile(given, "w") as packed:
            packed.writestr("ids", "no array")
    else:
        np.savez_compressed(given, ids=np.arange(1200).reshape(100, 12))
        content = bytearray(given.read_bytes())
        content[120:400] = b"\xff" * 280
        given.write_bytes(content)
    told = CliRunner().invoke(main, ["check", str(model), str(model), "--inputs", str(given), "--seconds", "0.05"])
    assert told.exit_code == 2, told.output
    assert "inputs.npz" in told.output


def test_text_that_a_model_takes_is_compared_on_what_was_given_and_said_to_be_no_number(tmp_path):
    def labels(name: str, last: str) -> Path:
        graph = helper.make_graph(
            [
                helper.make_node(
                    "LabelEncoder",
                    ["x"],
                    ["y"],
                    domain="ai.onnx.ml",
                    keys_strings=["a", "b"],
                    values_strings=["c", last],
                )
            ],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.STRING, ["batch"])],
            [helper.make_tensor_value_info("y", TensorProto.STRING, ["batch"])],
        )
        domains = [helper.make_opsetid("", 18), helper.make_opsetid("ai.onnx.ml", 2)]
        onnx.save(helper.make_model(graph, opset_imports=domains, ir_version=9), tmp_path / name)
        return tmp_path / name

    given = tmp_path / "given.npz"
    np.savez(given, x=np.array(["a", "b"]))
    one, other = labels("one.onnx", "d"), labels("other.onnx", "e")
    words = ["--inputs", str(given), "--seconds", "0.05"]
    told = CliRunner().invoke(main, ["check", str(one), str(other), *words]).output
    assert "1 of 2 texts differ" in told
    assert "which cannot be made up" in told
    assert "TypeError" not in told
