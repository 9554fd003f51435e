"""Which task targets and outputs show, which output it judges, and what is said where they do not fit."""

import pytest
import torch

from foundation.errors import ConfigError, DataError, ModelError
from pipeline.recipe.task import TaskSection
from pipeline.tasks import find
from tests.pipeline.tasks.made import chosen, data_of

MAPS = [(torch.randn(3, 8, 8), torch.randint(0, 4, (8, 8))) for _ in range(40)]
LOGITS = torch.randn(2, 4, 8, 8)


def flags(kind=torch.int64, labels: int = 3):
    torch.manual_seed(0)
    return [(torch.randn(6), (torch.rand(labels) < 0.4).to(kind)) for _ in range(40)]


def test_multi_hot_targets_are_multilabel():
    task = chosen(data_of(flags()), torch.randn(2, 3))
    assert (task.name, task.reads, task.score.name) == ("multilabel", ("output",), "macro F1")
    assert chosen(data_of(flags(torch.float32)), torch.randn(2, 3)).name == "multilabel"


def test_numbers_that_begin_like_flags_are_numbers():
    samples = flags(torch.float32)
    data = data_of(samples[:1] + [(x, y + 0.5) for x, y in samples[1:-1]] + samples[-1:])
    assert chosen(data, torch.randn(2, 3)).name == "regression"
    counts = data_of([(x, torch.tensor([0, 1, number % 3])) for number, (x, _) in enumerate(flags())])
    with pytest.raises(DataError, match="No task is known"):
        chosen(counts, torch.randn(2, 3))


@pytest.mark.parametrize("outputs", [LOGITS, torch.randn(2, 4, 2, 2), torch.randn(2, 9, 8, 8)])
def test_label_maps_are_segmentation(outputs):
    assert chosen(data_of(MAPS), outputs).name == "segmentation"


def test_label_maps_beside_arrays_of_images_are_no_class_numbers():
    x, y = torch.randn(40, 3, 8, 8), torch.randint(0, 4, (40, 8, 8))
    data = find_data((x, y))
    assert data.classes is None
    assert chosen(data, LOGITS).name == "segmentation"


def find_data(content):
    from pipeline.data import find as datasets

    return datasets.load(content)


def test_labels_of_tokens_are_token_classification():
    samples = [(torch.randint(1, 50, (7,)), torch.randint(0, 5, (7,))) for _ in range(40)]
    assert chosen(data_of(samples), torch.randn(2, 7, 5)).name == "token-classification"
    with pytest.raises(DataError, match="No task is known"):
        chosen(data_of(samples), torch.randn(2, 7, 3))  # labels go to 4


def test_symbols_of_a_reader_are_named_and_not_guessed():
    samples = [(torch.randn(9, 4), torch.randint(1, 6, (4,))) for _ in range(40)]
    with pytest.raises(DataError) as found:
        chosen(data_of(samples), torch.randn(2, 9, 6))
    assert "that may be ctc" in str(found.value)
    assert "--set task.name=ctc" in str(found.value)
    assert chosen(data_of(samples, "ctc"), torch.randn(2, 9, 6), "ctc").score.name == "1 - CER"


def test_frames_before_samples_are_refused_with_what_to_do():
    samples = [(torch.randn(9, 4), torch.randint(1, 6, (4,))) for _ in range(40)]
    with pytest.raises(DataError) as found:
        chosen(data_of(samples, "ctc"), torch.randn(9, 2, 6), "ctc")
    assert "(frames, samples, symbols). Return (samples, frames, symbols): .transpose(0, 1)" in str(found.value)


@pytest.mark.parametrize("names", [("out", "aux"), ("aux", "out"), ("aux", "logits")])
def test_of_several_outputs_the_usual_name_counts(names):
    task = chosen(data_of(MAPS), dict.fromkeys(names, LOGITS))
    assert task.reads == (next(name for name in names if name != "aux"),)


def test_of_several_outputs_the_one_that_fits_counts():
    outputs = {"features": torch.randn(2, 512), "maps": LOGITS, "edges": torch.randn(2, 2, 8, 8)}
    assert chosen(data_of(MAPS), outputs).reads == ("maps",)
    with pytest.raises(ModelError, match="which of them is to be judged"):
        chosen(data_of(MAPS), {"one": LOGITS, "two": LOGITS})
    assert chosen(data_of(MAPS), {"one": LOGITS, "two": LOGITS}, output="two").reads == ("two",)
    with pytest.raises(ConfigError, match="no output 'three'"):
        chosen(data_of(MAPS), {"one": LOGITS, "two": LOGITS}, output="three")


@pytest.mark.parametrize(
    ("samples", "outputs", "name", "fits"),
    [
        (MAPS, LOGITS, "token-classification", "segmentation"),
        (MAPS, LOGITS, "regression", "segmentation"),
        (flags(), torch.randn(2, 3), "segmentation", "multilabel"),
        (flags(), torch.randn(2, 3), "ctc", "multilabel"),
        ([(torch.randn(6), torch.randn(3)) for _ in range(40)], torch.randn(2, 3), "multilabel", "regression"),
        (
            [(torch.arange(k, k + 7), torch.randint(0, 5, (7,))) for k in range(40)],
            torch.randn(2, 7, 5),
            "multilabel",
            "token-classification",
        ),
    ],
)
def test_the_task_that_would_fit_is_named(samples, outputs, name, fits):
    with pytest.raises(DataError) as found:
        chosen(data_of(samples, name), outputs, name)
    text = str(found.value)
    assert f"The loss of {name} cannot take" in text
    assert f"--set task.name={fits}" in text
    assert "\n" not in text
    assert len(text) < 500


def test_what_is_wrong_with_the_targets_of_the_right_task_is_told_as_it_is():
    maps = [(x, y + 4) for x, y in MAPS]
    with pytest.raises(DataError) as found:
        chosen(data_of(maps, "segmentation"), LOGITS, "segmentation")
    assert "the model has logits of 4 classes, 0 to 3. Number labels from 0" in str(found.value)


def test_detection_is_led_to_a_task_of_ones_own():
    with pytest.raises(ConfigError, match="file.py:callable that returns loss and boxes"):
        find.check(TaskSection(name="detection"))


def test_one_output_for_two_classes_is_led_to_multilabel():
    data = data_of([(torch.randn(6), number % 2) for number in range(40)])
    with pytest.raises(ModelError, match="task.name=multilabel"):
        chosen(data, torch.randn(2, 1))
    data = data_of([(torch.randn(6), number % 2) for number in range(40)], "multilabel")
    assert chosen(data, torch.randn(2, 1), "multilabel").score.name == "macro F1"
