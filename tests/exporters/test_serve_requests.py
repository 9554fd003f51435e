"""The server in a bundle on what is no image: arrays, texts, rows of a table; and answers that are no classes."""

import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
import tokenizers
from PIL import Image
from tokenizers import models, pre_tokenizers

from exporters import ExportError, InputNote, check, serve
from tests.exporters.bundles import WEIGHT, X, linear, make, note, rewrite, variant

RNG = np.random.default_rng(0)
VOCABULARY = ("[UNK]", "good", "bad", "film", "[CLS]")
TABLE = RNG.standard_normal((5, 3)).astype(np.float32)


def parsed(folder, text, **tensors):
    made = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 18]>\n{text}')
    for name, value in tensors.items():
        made.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    onnx.save(made, folder / "model.onnx")
    return variant(folder / "model.onnx")


def tokenizer() -> bytes:
    made = tokenizers.Tokenizer(models.WordLevel({word: n for n, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A", pair="[CLS] $A $B:1", special_tokens=[("[CLS]", 4)]
    )
    made.enable_truncation(6)
    return made.to_str().encode()


IDS = np.array([[1, 2, 3], [2, 2, 1]])
NOTES = [
    InputNote(name="input_ids", shape=("n", "length"), dtype="int64", holds="ids"),
    InputNote(name="attention_mask", shape=("n", "length"), dtype="int64", holds="mask"),
]


def sentences(folder, kind="classes", **options):
    """A bundle that adds up the rows of a table for every id: (samples, 3), and the ids themselves."""
    model = parsed(
        folder,
        """g (int64[n, length] input_ids, int64[n, length] attention_mask) => (float[n, 3] y) {
            e = Gather (table, input_ids)  f = Cast <to = 1> (attention_mask)  u = Unsqueeze (f, two)
            m = Mul (e, u)  y = ReduceSum <keepdims = 0> (m, one) }""",
        table=TABLE,
        one=np.array([1]),
        two=np.array([2]),
    )
    golden = {
        "golden_inputs": {"input_ids": IDS, "attention_mask": np.ones_like(IDS)},
        "golden_outputs": {"y": TABLE[IDS].sum(1)},
        "inputs": NOTES,
        "labels": ["x", "y", "z"],
        "answers": {"y": kind},
        "files": {"tokenizer.json": tokenizer()},
    }
    return make([model], folder / "bundle", **golden | options).path


def served(bundle, given, *options):
    command = [sys.executable, "-B", *options, str(bundle / "serve.py"), str(given)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    return done, [json.loads(line) for line in done.stdout.splitlines()]


def asked(folder, *lines, name="ask.jsonl"):
    (folder / name).write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines))
    return folder / name


def share(score):
    return pytest.approx(1 / (1 + np.exp(-score)), abs=1e-3)


def best(ids):
    return "xyz"[TABLE[ids].sum(0).argmax()]


def test_texts_are_answered_with_the_tokenizer_of_the_bundle(tmp_path):
    bundle = sentences(tmp_path)
    given = asked(
        tmp_path,
        {"text": "good film"},
        {"text": "bad", "text_pair": "good"},
        {"text": "bad " * 50},
        {"tokens": ["film", "x"]},
    )
    done, lines = served(bundle, given)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line["label"] for line in lines] == [
        best([4, 1, 3]),
        best([4, 2, 1]),
        best([4, 2, 2, 2, 2, 2]),
        best([4, 3, 0]),
    ]
    assert lines[0]["file"] == "ask.jsonl"
    assert "tokenizer.json" in json.loads((bundle / "manifest.json").read_text())["files"]


def test_arrays_are_answered_one_or_several_at_a_time_and_by_every_kind_of_file(tmp_path):
    bundle = sentences(tmp_path)
    folder = tmp_path / "asked"
    folder.mkdir()
    asked(folder, {"input_ids": [1, 2, 3]}, name="a.json")
    asked(folder, [{"input_ids": IDS.tolist(), "attention_mask": [[1, 1, 1], [1, 0, 0]]}], name="b.json")
    np.savez(folder / "c.npz", input_ids=IDS, attention_mask=np.ones_like(IDS))
    done, lines = served(bundle, folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line["file"] for line in lines] == ["a.json", "b.json", "b.json", "c.npz", "c.npz"]
    assert [line["label"] for line in lines] == [
        best([1, 2, 3]),
        best([1, 2, 3]),
        best([2]),
        best(IDS[0]),
        best(IDS[1]),
    ]


BAD = {
    "no json": ("{", "no JSON"),
    "no object": ("3", "a request is an object"),
    "another name": ({"ids": [1]}, "there is no input 'ids'; the model takes input_ids, attention_mask"),
    "missing": ({"attention_mask": [1]}, "the input 'input_ids' is missing"),
    "ragged": ({"input_ids": [[1, 2], [1]]}, ""),
    "fractions": ({"input_ids": [1.5]}, "no int64"),
    "texts": ({"input_ids": ["a"]}, "holds no numbers"),
    "empty": ({"input_ids": []}, "holds no numbers"),
    "too deep": ({"input_ids": [[[1]]]}, "has the shape [1, 1, 1]"),
    "unequal": ({"input_ids": [[1], [2]], "attention_mask": [[1]]}, "1 and 2 samples"),
    "out of the table": ({"input_ids": [77]}, ""),
    "no text": ({"text": 3}, "text and text_pair are texts"),
    "no words": ({"tokens": "a b"}, "a list of words"),
    "both": ({"text": "a", "tokens": ["a"]}, "given as text"),
    "a row": ({"row": {"a": 1}}, "no table"),
}


def test_bad_requests_are_a_line_each_and_those_after_them_are_served(tmp_path):
    done, lines = served(sentences(tmp_path), asked(tmp_path, *(one for one, _ in BAD.values()), {"text": "good"}))
    assert (done.returncode, done.stderr) == (2, "")
    *wrong, last = lines
    assert last["label"] == best([4, 1])
    assert len(wrong) == len(BAD)
    for line, (_, says) in zip(wrong, BAD.values(), strict=True):
        assert says in line["error"]
        assert len(line["error"]) <= 200


def test_without_the_tokenizers_library_it_says_what_to_install(tmp_path):
    bundle = sentences(tmp_path)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "sitecustomize.py").write_text("import sys; sys.modules['tokenizers'] = None\n")
    command = [
        sys.executable,
        "-B",
        str(bundle / "serve.py"),
        str(asked(tmp_path, {"input_ids": [1]}, {"text": "good"})),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path / "none")})
    assert done.returncode == 1
    assert done.stderr == "texts need the tokenizers library, which is not installed: pip install tokenizers\n"
    assert json.loads(done.stdout)["label"] == best([1])


def test_a_changed_tokenizer_is_found(tmp_path):
    bundle = sentences(tmp_path)
    (bundle / "tokenizer.json").write_text("{}")
    assert "tokenizer.json was changed" in check(bundle)["reason"]


@pytest.mark.parametrize("name", ["serve.py", "manifest.json", "model.onnx", "../out", "a/b", ""])
def test_files_that_would_take_anothers_place_are_refused(tmp_path, name):
    with pytest.raises(ExportError, match="cannot take along"):
        sentences(tmp_path, files={name: b""})
    assert not (tmp_path / "bundle").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("values", lambda y: {"values": pytest.approx(y.tolist(), rel=1e-4)}),
        ("array", lambda y: {"outputs": {"y": {"values": pytest.approx(y.tolist(), rel=1e-4)}}}),
        ("embedding", lambda y: {"vector": pytest.approx(y.tolist(), rel=1e-4)}),
        ("labels", lambda y: {"labels": {"xyz"[n]: share(y[n]) for n in range(3) if y[n] > 0}}),
    ],
)  # fmt: skip
def test_answers_are_what_the_task_makes_of_outputs(tmp_path, kind, wanted):
    done, (line,) = served(sentences(tmp_path, kind), asked(tmp_path, {"input_ids": [1, 3]}))
    assert done.returncode == 0
    assert line == {"file": "ask.jsonl"} | wanted(TABLE[[1, 3]].sum(0))


def test_labels_of_words_and_label_maps_and_numbers_that_are_none():
    scores = np.eye(4)[[0, 1, 2, 2, 1]]
    labels = ["a", "b", "c", "d"]
    assert serve.told(scores, "tokens", labels, [1, 3]) == {"labels": ["b", "c"]}
    assert serve.told(scores.T, "tokens", labels, None) == {"labels": ["a", "b", "c", "c", "b"]}
    places = np.zeros((4, 2, 3))
    places[1, 0] = places[3, 1, 0] = 1
    assert serve.told(places, "map", labels, None) == {"shape": [2, 3], "counts": {"a": 2, "b": 3, "d": 1}}
    with pytest.raises(ValueError, match="no finite numbers"):
        serve.told(np.array([np.nan]), "values", labels, None)


def test_rows_of_a_table_become_features(tmp_path):
    columns = {
        "inputs": [
            {"name": "size", "kind": "number", "mean": 10.0, "deviation": 2.0},
            {"name": "colour", "kind": "category", "values": ["blue", "red"]},
        ]
    }
    weight = np.array([[1.0], [10.0], [100.0]], np.float32)
    model = parsed(tmp_path, "g (float[n, 3] features) => (float[n, 1] y) { y = MatMul (features, w) }", w=weight)
    golden = {
        "golden_inputs": {"features": np.eye(3, dtype=np.float32)},
        "golden_outputs": {"y": weight},
        "inputs": [InputNote(name="features", shape=("n", 3), dtype="float32")],
        "answers": {"y": "values"},
        "labels": [],
        "files": {"columns.json": json.dumps(columns).encode()},
    }
    bundle = make([model], tmp_path / "bundle", **golden).path
    rows = [{"size": 14, "colour": "red"}, {"colour": "blue"}, {"size": "x"}, {"siez": 1}]
    done, lines = served(bundle, asked(tmp_path, *({"row": row} for row in rows)))
    assert done.returncode == 2
    assert [line["values"] for line in lines[:2]] == [[102.0], [10.0]]
    assert "error" in lines[2]
    assert "no column 'siez'; the table has size, colour" in lines[3]["error"]


def test_images_are_stretched_where_the_model_was_trained_on_such(tmp_path):
    pixels = RNG.integers(0, 256, (2, 4, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    spec = note(fit="stretch").model_dump()
    wanted = np.asarray(Image.fromarray(pixels).resize((2, 2), Image.Resampling.BILINEAR), np.float32).transpose(
        2, 0, 1
    )
    np.testing.assert_allclose(serve.read(tmp_path / "a.png", spec)[0], (wanted / 255 - 0.5) / 0.25, rtol=1e-5)
    assert not np.allclose(serve.read(tmp_path / "a.png", note().model_dump())[0], (wanted / 255 - 0.5) / 0.25)


def test_a_model_of_images_takes_arrays_too(tmp_path):
    bundle = make([variant(linear(tmp_path / "linear.onnx"))], tmp_path / "bundle").path
    done, lines = served(bundle, asked(tmp_path, {"file": X.tolist()}))
    assert done.returncode == 0
    assert [line["label"] for line in lines] == ["abcd"[one] for one in (X.reshape(5, 12) @ WEIGHT).argmax(1)]


def test_a_model_of_texts_says_that_it_takes_no_images(tmp_path):
    bundle = sentences(tmp_path)
    (tmp_path / "photos").mkdir()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "photos" / "a.png")
    done, _ = served(bundle, tmp_path / "photos")
    assert (done.returncode, done.stdout) == (1, "")
    assert "a file gives it one alone; ask it in .json" in done.stderr


def counting(folder, golden):
    """A bundle whose model gives the ids of the largest table row, whole numbers, at any length."""
    model = parsed(
        folder,
        """g (int64[n, length] input_ids) => (int64[n, length] best, bool[n, length] some) {
            e = Gather (table, input_ids)  best = ArgMax <axis = 2, keepdims = 0> (e)  some = Greater (best, zero) }""",
        table=TABLE,
        zero=np.array(0),
    )
    return make(
        [model],
        folder / "bundle",
        golden_inputs={"input_ids": IDS},
        golden_outputs={"best": golden, "some": golden > 0},
        inputs=NOTES[:1],
        answers={"best": "array", "some": "array"},
        labels=[],
    ).path


def test_whole_numbers_are_compared_exactly(tmp_path):
    right = TABLE[IDS].argmax(2)
    bundle = counting(tmp_path, right)
    assert check(bundle)["ok"]
    arrays = dict(np.load(bundle / "golden.npz"))
    large = arrays["output_0"] * 0 + 10**6
    large[0, 0] = right[0, 0]  # scaled by the largest, an error of one would be within any tolerance
    for changed in (large, right.astype(np.float32) + 0.5):
        np.savez(tmp_path / "golden.npz", **arrays | {"output_0": changed})
        rewrite(bundle, "golden.npz", (tmp_path / "golden.npz").read_bytes())
        assert "best differs from the golden output" in check(bundle)["variants"]["plain"]["reason"]


def test_one_wrong_whole_number_of_large_ones_is_found(tmp_path):
    model = parsed(
        tmp_path, "g (int64[n, length] input_ids) => (int64[n, length] y) { y = Add (input_ids, million) }",
        million=np.array(10**6),
    )  # fmt: skip
    golden = {"golden_inputs": {"input_ids": IDS}, "inputs": NOTES[:1], "answers": {"y": "array"}, "labels": []}
    wrong = IDS + 10**6
    wrong[1, 1] += 1
    with pytest.raises(ExportError, match="y differs from the golden output in 1 of 6 whole numbers"):
        make([model], tmp_path / "bundle", golden_outputs={"y": wrong}, **golden)
    assert check(make([model], tmp_path / "bundle", golden_outputs={"y": IDS + 10**6}, **golden).path)["ok"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda manifest: manifest.update(answers={"y": "poem"}), "answers cannot be"),
        (lambda manifest: manifest.update(answers={"z": "values"}), "answers cannot be"),
        (lambda manifest: manifest.update(answers=[]), "answers cannot be"),
        (lambda manifest: manifest.update(answers={"y": ["values"]}), "answers cannot be"),
        (lambda manifest: manifest["inputs"][0].update(holds="music"), "holds of an input cannot be"),
        (lambda manifest: manifest["inputs"][0].update(fit=3), "fit of an input cannot be"),
        (lambda manifest: manifest["inputs"][0].update(rate="fast"), "rate of an input cannot be"),
        (lambda manifest: manifest.update(sizes={"length": [0]}), "sizes cannot be"),
        (lambda manifest: manifest.update(sizes=[4]), "sizes cannot be"),
    ],
)
def test_a_manifest_that_says_what_nobody_knows_is_one_line(tmp_path, change, says):
    from tests.exporters.bundles import reseal

    bundle = sentences(tmp_path)
    reseal(bundle, change)
    assert says in check(bundle)["reason"]


def test_a_bundle_from_before_there_were_answers_still_serves(tmp_path):
    from tests.exporters.bundles import reseal

    bundle = make([variant(linear(tmp_path / "linear.onnx"))], tmp_path / "bundle").path

    def older(manifest):
        del manifest["answers"], manifest["sizes"]
        for key in ("holds", "fit", "rate"):
            del manifest["inputs"][0][key]

    reseal(bundle, older)
    assert check(bundle)["ok"]
    assert served(bundle, asked(tmp_path, {"file": X[0].tolist()}))[1][0]["label"] in "abcd"


def test_a_file_that_unpacks_to_more_than_is_read_at_once_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "REQUEST_BYTES", 1 << 20)
    small, large, none = tmp_path / "small.npz", tmp_path / "large.npz", tmp_path / "none.npz"
    np.savez_compressed(small, x=np.zeros(100))
    np.savez_compressed(large, junk=np.zeros(1 << 20))
    none.write_text("no archive")
    assert large.stat().st_size < 1 << 14
    assert [set(one) for one in serve.requests(small)] == [{"x"}]
    with pytest.raises(ValueError, match="unpacks to"):
        next(serve.requests(large))
    with pytest.raises(ValueError, match=r"no \.npz"):
        next(serve.requests(none))
