"""Texts in .jsonl files: classes, pairs, labels of tokens, the tokenizer of a folder, and lines that are none."""

import json

import pytest
import tokenizers
import torch
from tokenizers import models, pre_tokenizers, processors

from foundation.errors import DataError
from pipeline import data
from pipeline.data.samples import Reading

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "a", "b", "the", "was", "very", "##y", "end")
CODE = {word: number for number, word in enumerate(WORDS)}


def folder(path, config=None, settings=None, pad="[PAD]"):
    """A model's folder with a tokenizer of a few words in it."""
    path.mkdir(exist_ok=True)
    made = tokenizers.Tokenizer(models.WordPiece(CODE, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", CODE["[CLS]"]), ("[SEP]", CODE["[SEP]"])],
    )
    made.save(str(path / "tokenizer.json"))
    (path / "config.json").write_text(json.dumps({"vocab_size": 14, "max_position_embeddings": 16} | (config or {})))
    (path / "tokenizer_config.json").write_text(json.dumps({"pad_token": pad} | (settings or {})))
    return path


@pytest.fixture
def model(tmp_path):
    return folder(tmp_path / "model")


def written(tmp_path, lines, name="d.jsonl"):
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (tmp_path / name).write_text(text)
    return f"jsonl:{tmp_path / name}"


def load(spec, model, **options):
    return data.load(spec, reading=Reading(tokenizer=model, **options))


def test_texts_become_ids_and_labels_classes(tmp_path, model):
    lines = [
        {
            "text": f"the film was {'very ' * (n % 5)}{'good' if n % 2 else 'bad'} {'a ' * (n // 5)}",
            "label": "ny"[n % 2],
        }
        for n in range(40)
    ]
    found = load(written(tmp_path, lines), model)
    ids, mask = found.inputs
    assert (ids.name, mask.name) == ("input_ids", "attention_mask")
    assert (ids.kind, mask.kind) == ("tokens", "mask")
    assert ids.free == mask.free == ((0, "tokens"),)
    assert found.fed.kwargs == ("input_ids", "attention_mask")
    assert found.labels == ("n", "y")
    assert ids.high <= len(WORDS)
    for part in data.PARTS:
        for (given, masked), labels in found.batches(part, 8):
            assert given.dtype == masked.dtype == torch.int64
            assert torch.equal(given != 0, masked.bool())
            assert given.shape[1] == int(masked.sum(1).max())
            assert torch.equal((given == CODE["good"]).any(1).long(), labels)
            assert bool((given[:, 0] == CODE["[CLS]"]).all())
    assert "tokenizer.json" in found.files


def test_texts_are_cut_at_what_the_model_bears_or_the_recipe_says(tmp_path, model):
    spec = written(tmp_path, [{"text": "very " * 30 + "good " * n, "label": n % 2} for n in range(40)])
    found = load(spec, model)
    (ids, _), _ = next(found.batches("train"))
    assert ids.shape[1] == 16
    assert bool((ids[:, -1] == CODE["[SEP]"]).all())
    assert next(load(spec, model, max_tokens=9).batches("train"))[0][0].shape[1] == 9
    with pytest.raises(DataError, match=r"data\.max_tokens is 17, and the model .* bears 16"):
        load(spec, model, max_tokens=17)
    again = tokenizers.Tokenizer.from_str(found.files["tokenizer.json"].decode())
    assert len(again.encode("very " * 30).ids) == 16


def test_models_whose_positions_begin_behind_the_padding_bear_fewer(tmp_path):
    spec = written(tmp_path, [{"text": "very " * 30 + "good " * n, "label": n % 2} for n in range(40)])
    found = load(spec, folder(tmp_path / "m", {"model_type": "roberta", "pad_token_id": 1}))
    assert next(found.batches("train"))[0][0].shape[1] == 14


def test_ids_are_filled_up_with_the_padding_id(tmp_path):
    lines = [{"text": "good " * (1 + n), "label": n % 2} for n in range(30)]
    found = load(written(tmp_path, lines), folder(tmp_path / "m", pad="end"))
    (ids, mask), _ = next(found.batches("train"))
    assert set(ids[mask == 0].tolist()) == {CODE["end"]}


def test_pairs_have_segments_where_the_model_wants_them(tmp_path, model):
    lines = [{"text": "good " * (n % 4 + 1), "text_pair": "bad " * (n % 7), "label": n % 2} for n in range(40)]
    found = load(written(tmp_path, lines), model)
    assert [one.name for one in found.inputs] == ["input_ids", "attention_mask", "token_type_ids"]
    (ids, mask, segments), _ = next(found.batches("train"))
    assert torch.equal((ids == CODE["bad"]) & (segments == 0), torch.zeros_like(ids).bool())
    assert bool(((segments == 1) <= (mask == 1)).all())
    without = folder(tmp_path / "m", settings={"model_input_names": ["input_ids", "attention_mask"]})
    assert len(load(written(tmp_path, lines), without).inputs) == 2
    assert len(load(written(tmp_path, lines), model, inputs=("input_ids", "attention_mask")).inputs) == 2


def test_labels_of_tokens_stand_at_the_first_piece_of_each_word(tmp_path, model):
    lines = [
        {"tokens": ["the", "filmy", *["very"] * (n % 4), "end"], "labels": ["O", "NOUN", *["O"] * (n % 4), "END"]}
        for n in range(40)
    ]
    for number, line in enumerate(lines):
        line["tokens"].append(WORDS[4 + number % 6])
        line["labels"].append("X")
        line["tokens"].extend(["a"] * (number // 4))
        line["labels"].extend(["O"] * (number // 4))
    found = load(written(tmp_path, lines), model)
    assert found.names == ("END", "NOUN", "O", "X")
    assert found.classes is None
    (ids, mask), target = next(found.batches("train"))
    assert target.shape == ids.shape
    assert set(target[mask == 0].tolist()) <= {-100}
    assert set(target[ids == CODE["##y"]].tolist()) == {-100}
    assert set(target[ids == CODE["film"]].tolist()) <= {1, 3}
    assert set(target[ids == CODE["[CLS]"]].tolist()) == {-100}
    numbered = [line | {"labels": [1] * len(line["labels"])} for line in lines]
    numbered[3]["labels"][0] = -100
    assert load(written(tmp_path, numbered), model).names == ("0", "1")


def test_numbers_are_values_where_they_are_no_classes(tmp_path, model):
    lines = [{"text": "good " * (n % 9 + 1) + "a " * n, "label": n / 2} for n in range(40)]
    found = load(written(tmp_path, lines), model)
    assert found.classes is None
    assert next(found.batches("test"))[1].dtype == torch.float32
    whole = [line | {"label": n % 3} for n, line in enumerate(lines)]
    assert load(written(tmp_path, whole), model).classes == 3
    assert load(written(tmp_path, whole), model, targets="values").classes is None


def test_without_labels_in_parts_and_with_own_keys(tmp_path, model):
    lines = [{"text": "good " * (n + 1)} for n in range(12)]
    found = load(written(tmp_path, lines + [{"text": "bad " * (n + 1)} for n in range(12)]), model)
    assert not found.labelled
    written(tmp_path, [line | {"stars": n % 2} for n, line in enumerate(lines)], "train.jsonl")
    written(tmp_path, [{"text": f"bad {line['text']}", "stars": n % 2} for n, line in enumerate(lines)], "test.jsonl")
    found = load(f"jsonl:{tmp_path}", model, target="stars")
    assert len(found.test) == 12
    assert found.classes == 2


def test_the_tokenizer_decides_the_fingerprint(tmp_path, model):
    spec = written(tmp_path, [{"text": "good " * (n + 1), "label": n % 2} for n in range(14)])
    first = load(spec, model).fingerprint
    assert load(spec, model / "tokenizer.json").fingerprint == first
    assert load(spec, model, max_tokens=9).fingerprint != first
    text = (model / "tokenizer.json").read_text().replace('"film"', '"movie"')
    (model / "tokenizer.json").write_text(text)
    assert load(spec, model).fingerprint != first


def test_a_missing_or_damaged_tokenizer_says_what_to_do(tmp_path, model):
    spec = written(tmp_path, [{"text": "good", "label": 0}] * 9)
    with pytest.raises(DataError, match=r"no tokenizer is known.*hf:FOLDER.*data\.tokenizer"):
        data.load(spec)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no tokenizer\.json\..*save_pretrained"):
        load(spec, tmp_path / "empty")
    (tmp_path / "empty" / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="no readable tokenizer"):
        load(spec, tmp_path / "empty")


def test_a_tokenizer_of_another_model_is_named(tmp_path):
    spec = written(tmp_path, [{"text": "good end " * (n + 1), "label": n % 2} for n in range(14)])
    with pytest.raises(DataError, match="gives the id 13, and the model beside it knows 10 tokens"):
        load(spec, folder(tmp_path / "m", {"vocab_size": 10}))


GOOD = [{"text": "good", "label": "a"}, {"text": "bad", "label": "b"}] * 10
WORDY = [{"tokens": ["good", "end"], "labels": ["a", "b"]}] * 10
BAD = {
    "no json": ([*GOOD, "{text"], "line 21 is no JSON"),
    "no object": ([*GOOD, "[1]"], "line 21 is [1], no JSON object"),
    "another key": ([{"txt": "good"}], "line 1 has the keys txt, not text or tokens. Did you mean text"),
    "no text": ([*GOOD, {"label": "a"}], "line 21: text is missing"),
    "an empty text": ([*GOOD, {"text": " ", "label": "a"}], "line 21: text is ' '"),
    "a number as text": ([*GOOD, {"text": 3, "label": "a"}], "line 21: text is 3"),
    "no label": ([*GOOD, {"text": "good"}], "line 21 has no label"),
    "a label for some": (
        [{"text": "good"}, {"text": "good", "label": "a"}],
        "line 2 has a label",
    ),
    "a number among names": ([*GOOD, {"text": "good", "label": 3}], "line 21: label is 3, no text"),
    "a name among numbers": (
        [{"text": "x", "label": 1}, {"text": "x", "label": "a"}],
        "line 2: label is 'a', no",
    ),
    "not a number": ([{"text": "x", "label": 1}, '{"text": "x", "label": NaN}'], "line 2: label is nan"),
    "a label too few": ([*WORDY, {"tokens": ["a", "b"], "labels": ["a"]}], "line 11 has 2 tokens and 1 labels"),
    "labels of two kinds": ([*WORDY, {"tokens": ["a"], "labels": [2]}], "line 11: labels is [2]"),
    "no words": ([*WORDY, {"tokens": [], "labels": []}], "line 11: tokens is []"),
    "negative": ([{"tokens": ["a"], "labels": [-3]}], "line 1 has the label -3"),
    "no pair": (
        [{"text": "a", "text_pair": "b", "label": 1}, {"text": "a", "label": 0}],
        "line 2: text_pair is missing",
    ),
    "empty": ([], "is empty"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_lines_are_named(tmp_path, model, case):
    lines, says = case
    with pytest.raises(DataError) as caught:
        load(written(tmp_path, lines), model)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.hint


def test_parts_that_differ_are_named(tmp_path, model):
    written(tmp_path, GOOD, "train.jsonl")
    written(tmp_path, [{"text": "good", "label": "c"}], "test.jsonl")
    with pytest.raises(DataError, match="line 1: the label 'c' is a class that the training part has not"):
        load(f"jsonl:{tmp_path}", model)
    written(tmp_path, [{"text": "good"}], "test.jsonl")
    with pytest.raises(DataError, match="other keys or labels"):
        load(f"jsonl:{tmp_path}", model)
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(DataError, match=r"holds test\.jsonl, and no training part"):
        load(f"jsonl:{tmp_path}", model)
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(DataError, match="no such file, nor a folder"):
        load(f"jsonl:{tmp_path}", model)


def test_a_number_beyond_all_floats_is_a_line_and_no_traceback(tmp_path, model):
    lines = [{"text": f"the {'very ' * n}film", "label": 0.5 + n} for n in range(8)]
    with pytest.raises(DataError, match="line 9: label is"):
        load(written(tmp_path, [*lines, f'{{"text": "bad", "label": {10**400}}}']), model)
