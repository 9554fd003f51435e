"""What stands beside published weights is followed: the order of classes, the padding, the pixels, the weights."""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from foundation.errors import WeightsError
from pipeline import data, models, runner
from pipeline.data.samples import Reading
from pipeline.models import published
from pipeline.recipe import config
from tests.pipeline.data.test_texts import CODE, folder, written

NAMES = ("positive", "negative", "neutral")
SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 14}


def bert(path, names=NAMES):
    """A classifier's folder, with weights and a tokenizer of a few words."""
    settings = transformers.BertConfig(
        **SMALL,
        max_position_embeddings=24,
        id2label=dict(enumerate(names)),
        label2id={n: i for i, n in enumerate(names)},
    )
    folder(path)
    transformers.BertForSequenceClassification(settings).save_pretrained(path)
    return path


def reviews(tmp_path, labels):
    texts = [f"the {'very ' * (n % 8)}film was {'good ' * (n // 8)}end" for n in range(64)]
    return written(tmp_path, [{"text": text, "label": labels[n % len(labels)]} for n, text in enumerate(texts)])


def test_text_labels_are_numbered_as_the_folder_numbers_them(tmp_path):
    path = bert(tmp_path / "m")
    spec = f"hf:{path}"
    assert published.class_names(spec) == NAMES
    recipe = {"model": spec, "data.source": reviews(tmp_path, ("Negative", "neutral", "POSITIVE"))}
    source, found, _ = runner.sources(spec, None, config.load(None, recipe))
    assert found.labels == ("POSITIVE", "Negative", "neutral")
    assert source.num_classes == 3
    for (ids, _), numbers in found.batches("test", 4):
        lines = (ids == CODE["very"]).sum(1) + 8 * (ids == CODE["good"]).sum(1)  # their numbers, as `reviews` has them
        assert torch.equal(numbers, torch.tensor([1, 2, 0])[lines % 3])
    recipe["data.source"] = reviews(tmp_path, ("bad", "good"))
    _, found, _ = runner.sources(spec, None, config.load(None, recipe))
    assert found.labels == ("bad", "good")


@pytest.mark.parametrize(
    "named", [{"0": "LABEL_0", "1": "LABEL_1"}, {"0": "a", "2": "b"}, {"0": "a", "1": "A"}, [], {"x": "a"}]
)
def test_names_that_say_nothing_are_no_names(tmp_path, named):
    (tmp_path / "config.json").write_text(json.dumps({"id2label": named}))
    assert published.class_names(f"hf:{tmp_path}") == ()


def test_folders_of_images_follow_the_models_order_and_pixels(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(12):
            pixels = np.full((16, 16, 3), number * 20 + (name == "dog"), np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    reading = Reading(names=("Dog", "Cat"), pixels=((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)))
    found = data.load(f"imagefolder:{tmp_path}", input_size=(3, 16, 16), reading=reading)
    assert found.labels == ("dog", "cat")
    (images,), numbers = next(found.batches("train", 64))
    assert set(numbers.tolist()) == {0, 1}
    shades = (images[:, 0, 0, 0] * 0.25 + 0.5) * 255
    assert torch.equal(shades.round().long() % 2 == 1, numbers == 0)


def test_what_pixels_are_normalised_by_is_read_where_the_weights_were_published(tmp_path):
    assert published.pixels("timm:vit_base_patch16_224") == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert published.pixels("timm:resnet18") == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert published.pixels("resnet18") is None
    assert published.pixels(f"hf:{tmp_path}") is None
    said = tmp_path / "preprocessor_config.json"
    said.write_text(json.dumps({"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.25]}))
    assert published.pixels(f"hf:{tmp_path}") == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.25))
    for odd in ({"do_normalize": False}, {"image_std": [0.5, 0.0, 0.5]}, {"image_std": [1]}, {"image_std": "x"}):
        said.write_text(json.dumps({"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.25], **odd}))
        assert published.pixels(f"hf:{tmp_path}") is None


def test_other_weights_in_the_folder_are_another_model(tmp_path):
    path = bert(tmp_path / "m")
    before = models.load(f"hf:{path}").fingerprint
    assert models.load(f"hf:{path}").fingerprint == before
    net = transformers.BertForSequenceClassification.from_pretrained(path)
    with torch.no_grad():
        net.classifier.bias += 1
    net.save_pretrained(path)
    assert models.load(f"hf:{path}").fingerprint != before


def test_weights_of_older_folders_are_used(tmp_path):
    path = bert(tmp_path / "m")
    state = transformers.BertForSequenceClassification.from_pretrained(path).state_dict()
    (path / "model.safetensors").unlink()
    assert not models.load(f"hf:{path}").origin.brings
    torch.save(state, path / "pytorch_model.bin")
    source = models.load(f"hf:{path}")
    assert source.origin.brings
    found = source.pretrained()
    assert torch.equal(found.state["net.classifier.weight"], state["classifier.weight"])
    torch.save({"net": torch.nn.Linear(2, 2)}, path / "pytorch_model.bin")  # a pickle with code in it
    with pytest.raises(WeightsError):
        source.pretrained()


@pytest.mark.parametrize(("pad", "added"), [("[PAD]", True), ("[SEP]", True), ("[SEP]", False), (None, False)])
def test_texts_are_filled_up_with_what_the_model_looks_for(tmp_path, pad, added):
    """A decoder classifies the last token that is no padding: alone as in a batch with longer texts."""
    path = folder(tmp_path / "m", pad=pad)
    if added:  # else it is one of the vocabulary
        whole = json.loads((path / "tokenizer.json").read_text())
        token = {"id": {"[PAD]": 0, "[SEP]": 3}[pad], "content": pad, "special": True, "single_word": False,
                 "lstrip": False, "rstrip": False, "normalized": False}  # fmt: skip
        (path / "tokenizer.json").write_text(json.dumps({**whole, "added_tokens": [token]}))
    torch.manual_seed(0)
    transformers.GPT2Config(
        vocab_size=14, n_positions=16, n_embd=8, n_layer=1, n_head=2, eos_token_id=13, bos_token_id=13, num_labels=2,
        architectures=["GPT2ForSequenceClassification"],
    ).save_pretrained(path)  # fmt: skip
    source = models.load(f"hf:{path}", num_classes=2)
    model = source.build().eval()
    reading = Reading(tokenizer=path)
    found = data.load(reviews(tmp_path, ("a", "b")), reading=reading)
    (ids, mask), _ = next(found.batches("test", 6))
    assert not bool(mask.all())
    with torch.no_grad():
        together = model(ids, mask)
        for row in range(len(ids)):
            length = int(mask[row].sum())
            alone = model(ids[row : row + 1, :length], mask[row : row + 1, :length])
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)
