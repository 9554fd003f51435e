"""Where model, data and task meet: what a forward takes and returns, by name, before anything is spent."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from foundation.errors import ConfigError, ModelError
from pipeline import models, runner
from pipeline.channels import analyse, shrink
from pipeline.channels.program.capture import capture
from pipeline.channels.program.macs import count_macs
from pipeline.data import find
from pipeline.models.graph import graph_of
from pipeline.models.source import example
from pipeline.rebuilding.rebuild import rebuild
from pipeline.recipe.config import Config
from pipeline.recipe.data import DataSection
from pipeline.recipe.task import TaskSection
from pipeline.release import fingerprint
from pipeline.runner import Reading
from pipeline.tasks.entry import meet


@dataclass
class Answer:
    logits: Tensor
    parts: tuple[Tensor, Tensor]
    nothing: None = None


class Keyed(nn.Module):
    """A positional input, one by keyword only, an optional one; returns a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, x: Tensor, extra: Tensor | None = None, *, meta: dict[str, Tensor]) -> Answer:
        made = self.a(x) + self.b(meta["age"])
        return Answer(made, (made * 2, made[:, :1]))


def rows(count: int = 60, **more: object) -> list[dict[str, object]]:
    torch.manual_seed(0)
    return [{"x": torch.randn(4), "meta": {"age": torch.randn(2)}, "label": n % 3} | more for n in range(count)]


def met(model: nn.Module, samples: object, task: TaskSection | None = None, **section: object):
    cfg = DataSection(**section)
    data = find.load(samples, reading=Reading(inputs=cfg.inputs, target=cfg.target, dims=cfg.dims))
    source = models.load(model, num_classes=data.classes, input_size=data.input_size)
    return meet(source, data, cfg, task or TaskSection())


def test_keyword_only_inputs_in_mappings_and_dataclasses_of_outputs_keep_their_names():
    source, data, task = met(Keyed(), rows())
    assert [one.name for one in source.inputs] == [one.name for one in data.inputs] == ["x", "meta.age"]
    assert source.outputs == ("logits", "parts.0", "parts.1")
    assert (task.name, task.reads) == ("classification", ("logits",))
    model = source.build()
    assert sorted(model.state_dict()) == ["a.bias", "a.weight", "b.bias", "b.weight"]
    (inputs, _) = next(data.batches("test", 8))
    plain = Keyed()
    plain.load_state_dict(model.state_dict())
    wanted = plain(inputs[0], meta={"age": inputs[1]})
    found = model(*inputs)
    assert torch.equal(found["logits"], wanted.logits)
    assert torch.equal(found["parts.1"], wanted.parts[1])
    program = graph_of(model, source)
    assert torch.allclose(program(*inputs)[0], wanted.logits)


def test_outputs_that_the_task_does_not_read_can_be_left_out():
    source, _, _ = met(Keyed(), rows(), TaskSection(keep_outputs=False))
    assert source.outputs == ("logits",)
    assert list(source.build()(*example(source))) == ["logits"]


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.boxes, self.classes = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.boxes(x), self.classes(x)


def test_of_two_outputs_that_can_be_the_logits_the_user_says_which():
    samples = [(row["x"], row["label"]) for row in rows()]
    with pytest.raises(ConfigError, match="output_0 and output_1 can be the logits of 3 classes"):
        met(Two(), samples)
    _, _, task = met(Two(), samples, TaskSection(output="output_1"))
    assert task.reads == ("output_1",)
    with pytest.raises(ConfigError, match="no output 'output_2'"):
        met(Two(), samples, TaskSection(output="output_2"))


@pytest.mark.parametrize(
    ("samples", "says"),
    [
        (
            [{"xx": one["x"], "meta": one["meta"], "label": one["label"]} for one in rows()],
            "'xx', which .* does not take",
        ),
        ([{"x": one["x"], "label": one["label"]} for one in rows()], "also wants meta"),
        ([((one["x"],) * 3, one["label"]) for one in rows()], "gives 3 inputs, and .* takes 2"),
    ],
)
def test_inputs_that_a_forward_does_not_take_are_named(samples, says):
    with pytest.raises(ModelError, match=says):
        met(Keyed(), samples)


def test_entries_that_are_no_inputs_are_left_out_where_the_recipe_names_the_inputs():
    source, _, _ = met(Keyed(), rows(name="a text"), inputs=("x", "meta"))
    assert [one.name for one in source.inputs] == ["x", "meta.age"]


class Series(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(50, 8), nn.Linear(8, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        kept = attention_mask[..., None].float()
        return self.head((self.table(input_ids) * kept).sum(1) / kept.sum(1))


def texts(low: int = 5, high: int = 12) -> list[dict[str, Tensor]]:
    torch.manual_seed(0)
    lengths = [low + n % (high - low + 1) for n in range(60)]
    return [
        {"input_ids": torch.randint(0, 50, (n,)), "attention_mask": torch.ones(n, dtype=torch.long)} for n in lengths
    ]


def test_ids_of_unequal_length_are_filled_up_and_their_length_is_free():
    source, data, task = met(Series(), texts())
    assert (task.name, task.taught) == ("distil", True)
    assert [one.kind for one in source.inputs] == ["tokens", "mask"]
    assert source.free == ({1: "length"}, {1: "length"})
    assert dict(source.sizes)["length"] == (11, 5, 12)  # a prime for the usual one, then the ends
    (ids, mask), _ = next(data.batches("test", 12))
    assert ids.shape == mask.shape and int(mask.sum(1).min()) < ids.shape[1]
    program = graph_of(source.build(), source)
    assert program(torch.zeros(3, 7, dtype=torch.long), torch.ones(3, 7, dtype=torch.long)).shape == (3, 4)


def test_ids_of_unequal_length_without_a_mask_are_refused():
    with pytest.raises(Exception, match="give a DataLoader with a collate_fn"):
        met(Series(), [{"input_ids": one["input_ids"], "label": 1} for one in texts()])


def test_a_dimension_that_is_not_free_in_the_model_is_refused():
    fixed = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    samples = [(torch.randn(4, 3), n % 3) for n in range(60)]
    with pytest.raises(ConfigError, match="takes length = 4 only"):
        met(fixed, samples, dims={"input": ("batch", "length", 3)})


def test_capture_needs_the_dimension_to_be_free():
    free = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    captured = capture(free, (torch.randn(2, 1, 8, 8),), free=((2, 3),))
    assert captured(torch.randn(2, 1, 11, 6)).shape == (2, 3)
    sizes = [
        node.meta["val"].shape
        for node in captured.program.graph.nodes
        if node.name == "input_1" or node.op == "placeholder"
    ]
    batch, _, height, _ = next(shape for shape in sizes if len(shape) == 4 and not isinstance(shape[0], int))
    assert captured.of_batch(batch) and not captured.of_batch(height)


def test_free_sizes_count_as_the_usual_ones_in_multiply_accumulates():
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.MaxPool2d(2), nn.Conv2d(4, 2, 3, padding=1)).eval()
    wanted = 9 * 4 * 24 * 40 + 9 * 4 * 2 * 12 * 20
    for free in ((), ((2, 3),)):
        assert count_macs(capture(net, (torch.randn(2, 1, 24, 40),), free=free).program) == wanted


def test_a_task_is_another_one_where_the_code_of_its_loss_changed(monkeypatch):
    _, _, task = met(Two(), [(row["x"], row["label"]) for row in rows()], TaskSection(output="output_1"))
    before = runner._task_digest(task)
    assert runner._task_digest(replace(task, code="mine")) != before
    monkeypatch.setattr(fingerprint, "code_digest", lambda name: f"changed {name}")
    assert runner._task_digest(task) != before


def test_a_task_taught_by_the_dense_model_sets_labels_aside():
    samples = [(row["x"], row["label"]) for row in rows()]
    cfg = Config(task=TaskSection(name="embedding", output="output_0"))
    _, data, task = runner.sources(Two(), samples, cfg)
    assert (task.taught, data.labelled) == (True, False)
    with pytest.raises(ConfigError, match="cannot be trained"):
        runner.sources("resnet18", "digits", Config(task=TaskSection(name="distil")))


class OtherInTraining(nn.Module):
    """Answers in eval mode, and what its own loss wants in training mode: so do detectors."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor] | tuple[Tensor, dict[str, Tensor]]:
        raw = {"raw": self.b(self.a(x).relu())}
        return raw if self.training else (raw["raw"].sigmoid(), raw)


def test_other_outputs_in_training_mode_are_no_hindrance_to_the_original_class_and_are_named_to_our_loop():
    samples = [(torch.randn(4), n % 3) for n in range(60)]
    source, _, _ = met(OtherInTraining(), samples, TaskSection(output="output_0", keep_outputs=False))
    model = source.build()
    with pytest.raises(ModelError, match="In training mode OtherInTraining returns raw, in eval mode output_0"):
        model.train()(torch.randn(2, 4))
    captured = graph_of(model.eval(), source)
    analysis = analyse(captured)
    removed = {one.name: np.arange(one.size) < one.size // 2 for one in analysis.clusters}
    folded = captured.fold(analysis.masks(removed))
    made, structure = rebuild(model, folded, analysis, removed, shrink(folded, analysis, removed))
    assert structure.original, structure.why
    assert made.a.out_features == 4


class ByTheEnd(nn.Module):
    """Classifies by what it makes of the token 9, of which every sentence has to hold as many."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.a, self.head = nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.a(self.table(ids)).relu()
        return self.head(x[ids.eq(9)].view(len(ids), -1, 8)[:, -1])


@pytest.mark.parametrize("filled", [0, 3])
def test_made_up_sentences_end_with_the_token_that_those_of_the_data_end_with(filled):
    torch.manual_seed(0)
    body = torch.randint(0, 9, (60, 7))
    end = torch.cat([torch.full((60, 1), 9), torch.full((60, filled), 11)], 1)
    source, data, _ = met(ByTheEnd(), [{"ids": ids, "label": n % 3} for n, ids in enumerate(torch.cat([body, end], 1))])
    assert source.inputs[0].last == data.inputs[0].last == 9
    (ids,) = example(source, 50)
    assert bool((ids[:, -1] == 9).all()) and int((ids == 9).sum()) == 50
    assert source.build()(ids).shape == (50, 3)


def test_a_token_that_stands_elsewhere_too_ends_nothing():
    torch.manual_seed(0)
    ids = torch.randint(0, 12, (60, 8))
    ids[:, 2] = ids[:, -1]
    source, _, _ = met(ByTheStart(), [{"ids": row, "label": n % 3} for n, row in enumerate(ids)])
    assert source.inputs[0].last is None


class ByTheStart(ByTheEnd):
    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.a(self.table(ids)).relu()[:, 0])
