import itertools

import pytest
import torch
from torchmetrics.text import CharErrorRate, EditDistance

from foundation.errors import DataError, ModelError
from pipeline.tasks import ctc
from tests.pipeline.tasks.made import data_of, value

TASK = ctc.task("ctc", "output")
SCORES = {score.name: score for score in TASK.scores}


def drawn(rows: int = 30, frames: int = 12, symbols: int = 6, longest: int = 5):
    """Noisy frames that show the target's symbols, each once, between blanks."""
    torch.manual_seed(0)
    target = torch.full((rows, longest), -1)
    logits = torch.randn(rows, frames, symbols)
    for row in range(rows):
        length = 1 + row % longest
        target[row, :length] = torch.randint(1, symbols, (length,))
        logits[row, :, 0] += 3
        for place in range(length):
            logits[row, 2 * place, target[row, place]] += 5.5
    return {"output": logits}, target


def text(row) -> str:
    return "".join(chr(96 + int(one)) for one in row if int(one) > 0)


def test_scores_are_those_of_torchmetrics():
    outputs, target = drawn()
    found = [text(row) for row in ctc.decoded(outputs["output"], torch.full((30,), 12))]
    wanted = [text(row) for row in target]
    rate = float(CharErrorRate()(found, wanted))
    assert 0.05 < rate < 0.9
    assert value(SCORES["1 - CER"], outputs, target) == pytest.approx(1 - rate, abs=1e-6)
    exact = sum(a == b for a, b in zip(found, wanted, strict=True)) / 30
    assert 0 < exact < 1
    assert value(SCORES["exact sequences"], outputs, target) == pytest.approx(exact)


def test_greedy_decoding_joins_repetitions_and_takes_blanks_out():
    path = torch.tensor([0, 2, 2, 0, 2, 1, 1, 3, 0])
    logs = torch.nn.functional.one_hot(path, 4)[None].float()
    assert ctc.decoded(logs, torch.tensor([9])) == [[2, 2, 1, 3]]
    assert ctc.decoded(logs, torch.tensor([5])) == [[2, 2]]


def test_edits_are_those_of_torchmetrics():
    torch.manual_seed(1)
    rows = [torch.randint(1, 4, (length,)).tolist() for length in (0, 1, 2, 3, 5, 8, 8)]
    for one, other in itertools.product(rows, rows):
        wanted = EditDistance(reduction="sum")([text(one)], [text(other)])
        assert ctc.distance(one, other) == int(wanted), (one, other)


def test_the_loss_sums_over_every_path_that_gives_the_target():
    torch.manual_seed(0)
    logits, target = torch.randn(2, 4, 3), torch.tensor([[1, 2], [1, -1]])
    found = TASK.losses({"output": logits}, target, 0.0)
    for row, wanted in enumerate(([1, 2], [1])):
        chance = 0.0
        for path in itertools.product(range(3), repeat=4):
            if [k for k, _ in itertools.groupby(path) if k != 0] == wanted:
                chance += float(torch.stack([logits[row].softmax(1)[t, k] for t, k in enumerate(path)]).prod())
        assert float(found[row]) == pytest.approx(-float(torch.tensor(chance).log()) / len(wanted), rel=1e-4)


def test_logarithms_of_probabilities_are_as_good_as_logits():
    outputs, target = drawn()
    logs = {"output": outputs["output"].log_softmax(2)}
    assert torch.allclose(TASK.losses(outputs, target, 0.0), TASK.losses(logs, target, 0.0), rtol=1e-4)


def test_a_mapping_of_targets_and_lengths_says_the_same():
    outputs, target = drawn()
    lengths = (target >= 0).sum(1)
    given = {"targets": torch.where(target < 0, 1, target), "lengths": lengths}
    assert torch.equal(TASK.losses(outputs, given, 0.0), TASK.losses(outputs, target, 0.0))


def test_frames_that_were_read_from_filling_count_for_nothing():
    """A short sample in a batch beside a long one has the loss and the scores that it has alone."""
    outputs, target = drawn(frames=12)
    logits, frames = outputs["output"], torch.arange(30) % 3 + 10
    lone = {name: [] for name in (*SCORES, "loss")}
    for row, count in enumerate(frames.tolist()):
        alone = {"output": logits[row : row + 1, :count]}
        lone["loss"].append(TASK.losses(alone, target[row : row + 1], 0.0))
        for name, score in SCORES.items():
            lone[name].append(score.statistics(alone, target[row : row + 1]))
    filled = torch.where(torch.arange(12)[None, :, None] < frames[:, None, None], logits, torch.randn(30, 12, 6) * 9)
    for given in ({"targets": target, "frames": frames}, {
        "targets": target.clamp_min(1), "lengths": (target > 0).sum(1), "frames": frames
    }):  # fmt: skip
        assert torch.allclose(TASK.losses({"output": filled}, given, 0.0), torch.cat(lone["loss"]), rtol=1e-5)
        for name, score in SCORES.items():
            assert torch.equal(score.statistics({"output": filled}, given), torch.cat(lone[name]))
    blind = SCORES["1 - CER"].statistics({"output": filled}, target)
    assert not torch.equal(blind, torch.cat(lone["1 - CER"]))


def test_frames_come_with_the_samples():
    samples = [(torch.randn(9, 4), {"targets": [1, 2][: 1 + n % 2], "frames": 5 + n % 4}) for n in range(40)]
    for _, target in data_of(samples, "ctc").batches("train", 6):
        assert target["frames"].shape == (len(target["targets"]),)
        assert ctc.fits(torch.randn(len(target["frames"]), 9, 4), target)
        assert set(target["targets"].flatten().tolist()) <= {-1, 1, 2}


def test_a_target_without_room_costs_nothing_but_not_all_of_them():
    logits = torch.randn(2, 3, 3)
    assert TASK.losses({"output": logits}, torch.tensor([[1, 1, 1], [1, -1, -1]]), 0.0)[0] == 0
    with pytest.raises(DataError, match="4 symbols or more, the model gives 3 frames"):
        TASK.losses({"output": logits}, torch.tensor([[1, 2, 1, 2], [1, 2, 1, 2]]), 0.0)


def test_sequences_of_unequal_length_are_filled_up():
    samples = [(torch.randn(9, 4), list(range(1, 2 + number % 4))) for number in range(40)]
    for _, target in data_of(samples, "ctc").batches("train", 6):
        lengths = (target > 0).sum(1)
        assert target.shape[1] == lengths.max() > lengths.min()
        assert torch.equal(target == -1, torch.arange(target.shape[1]) >= lengths[:, None])


@pytest.mark.parametrize(
    ("shape", "target", "error", "words"),
    [
        ((5, 2, 4), torch.tensor([[1], [2]]), ModelError, "(frames, samples, symbols)"),
        ((2, 5, 4), torch.tensor([[4], [2]]), DataError, "symbol 4; the model knows 0 to 3"),
        ((2, 5, 4), torch.tensor([[0], [2]]), DataError, "the blank"),
        ((2, 5, 4), torch.tensor([[-1, 1], [2, 1]]), DataError, "before the end"),
        ((2, 5, 4), torch.tensor([1, 2]), DataError, "filled with -1"),
        ((2, 5), torch.tensor([[1], [2]]), ModelError, "Return logits (samples, frames, symbols)"),
        ((2, 5, 4), {"targets": torch.tensor([[1], [2]])}, DataError, "without lengths"),
        ((2, 5, 4), {"targets": torch.tensor([[1], [2]]), "lengths": torch.tensor([1, 2])}, DataError, "go to 2"),
        ((2, 5, 4), {"targets": torch.tensor([[1], [2]]), "frames": torch.tensor([5, 6])}, DataError, "gives 5 frames"),
        ((2, 5, 4), {"targets": torch.tensor([[1], [2]]), "frames": torch.tensor([5, 0])}, DataError, "1 or more"),
        ((2, 5, 4), {"targets": torch.tensor([[1], [2]]), "frames": torch.tensor([5])}, DataError, "of 2 samples"),
    ],
)
def test_what_does_not_fit(shape, target, error, words):
    with pytest.raises(error) as found:
        TASK.losses({"output": torch.zeros(shape)}, target, 0.0)
    assert words in str(found.value)
