"""Each stage called alone, as a plain function, in the ways that one default run does not show."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from foundation.errors import MaskError
from foundation.files import save_tensors
from pipeline import data, models
from pipeline.artifacts.eager import Baseline, Folded, Pruned
from pipeline.measurements import Measurements
from pipeline.models.source import Pretrained
from pipeline.progress import Progress
from pipeline.recipe.prune import PruneSection
from pipeline.recipe.removal import FoldSection, GroupSwitches, ShrinkSection
from pipeline.recipe.source import BaselineSection
from pipeline.recipe.train import FinetuneSection, TrainSettings
from pipeline.stages import s0_baseline, s1_prune, s2_finetune, s3_fold, s4_shrink
from pipeline.tasks import classification
from pipeline.tasks.evaluation import evaluate
from pipeline.training import masks

TINY = f"{Path(__file__).parents[1] / 'tiny.py'}:build"


class Told(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


SILENT, NOTHING = Progress(), Measurements()
TASK = classification.task("classification", "output")


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", input_size=(3, 16, 16))


@pytest.fixture(scope="module")
def source(digits):
    return models.load(TINY, num_classes=digits.classes, input_size=digits.input_size)


@pytest.fixture(scope="module")
def baseline(source, digits, tmp_path_factory) -> Baseline:
    out = tmp_path_factory.mktemp("baseline")
    cfg = BaselineSection(train=TrainSettings(epochs=3, lr=0.1), seconds=0.1)
    return s0_baseline.run(cfg, out, source, digits, TASK, SILENT).save()


def prune(source, digits, baseline, out: Path, **settings) -> Pruned:
    out.mkdir()
    return s1_prune.run(PruneSection(**settings), out, source, digits, baseline, TASK, NOTHING, SILENT).save()


def finish(source, digits, baseline, pruned: Pruned, tmp_path: Path):
    """Fine-tune, fold and shrink what was pruned."""
    folders = [tmp_path / name for name in ("finetune", "fold", "shrink")]
    for folder in folders:
        folder.mkdir()
    cfg = FinetuneSection(train=TrainSettings(epochs=1, lr=0.01))
    tuned = s2_finetune.run(cfg, folders[0], source, digits, baseline, pruned, TASK, SILENT).save()
    folded = s3_fold.run(FoldSection(), folders[1], source, digits, pruned, tuned).save()
    shrunk = s4_shrink.run(ShrinkSection(), folders[2], source, digits, pruned, folded, SILENT).save()
    return folded, shrunk


def test_the_baseline_learns_and_reads_back_the_same(baseline):
    assert baseline.trained_here
    assert baseline.score > 0.8
    assert Baseline.load(baseline.folder) == baseline
    assert (baseline.folder / "history.csv").read_text().count("\n") == 4


@pytest.mark.parametrize("fresh", [(), ("head.weight", "head.bias")])
def test_a_head_that_the_weights_lack_is_trained_from_them(source, digits, baseline, tmp_path, fresh):
    state = baseline.weights()
    blank = {name: torch.zeros_like(value) if name in fresh else value for name, value in state.items()}
    assert set(fresh) <= blank.keys()
    brought = replace(source.origin, pretrained=lambda: Pretrained(blank, fresh, "a library"))
    given = replace(source, origin=brought)
    told = Told()
    cfg = BaselineSection(weights="pretrained", train=TrainSettings(epochs=1, lr=0.01), seconds=0.1)
    made = s0_baseline.run(cfg, tmp_path, given, digits, TASK, told)
    assert made.score > 0.6
    assert made.trained_here is bool(fresh)
    assert any("from these weights for 1 epochs" in line for line in told.lines) is bool(fresh)
    unlabelled = replace(digits, labelled=False)
    (tmp_path / "u").mkdir()
    made = s0_baseline.run(cfg, tmp_path / "u", given, unlabelled, TASK, told)
    assert not made.trained_here
    assert any("answers at random" in line for line in told.lines) is bool(fresh)


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": "one-shot"},
        {"schedule": "one-shot", "scope": "global", "norm": "l1"},
        {"schedule": "iterative", "steps": 2, "train": TrainSettings(epochs=1, lr=0.01)},
        {"schedule": "gradual", "steps": 4, "train": TrainSettings(epochs=2, lr=0.01)},
    ],
    ids=lambda s: f"{s['schedule']}-{s.get('scope', 'layer')}",
)
def test_every_schedule_cuts_what_it_promised_and_keeps_the_originals(source, digits, baseline, tmp_path, settings):
    pruned = prune(source, digits, baseline, tmp_path / "prune", ratio=0.5, align=1, **settings)
    assert pruned.groups_cut == pytest.approx(0.5 * pruned.groups, abs=2)
    state, chosen = pruned.weights(), pruned.masks()
    assert all((state[name][~mask] != 0).any() for name, mask in chosen.items() if (~mask).any() and mask.dim() > 1)
    _, shrunk = finish(source, digits, baseline, pruned, tmp_path)
    assert (shrunk.params_after, shrunk.macs_after) == (pruned.expected_params, pruned.expected_macs)
    assert not list(tmp_path.rglob("*.pt")), "a training checkpoint was left behind"


def test_widths_by_curves_leave_no_more_operations_and_go_through_the_chain(source, digits, baseline, tmp_path):
    by_layer = prune(source, digits, baseline, tmp_path / "layer", ratio=0.5, align=1)
    pruned = prune(source, digits, baseline, tmp_path / "prune", ratio=0.5, align=1, scope="curves", samples=32)
    assert 0.9 * by_layer.expected_macs <= pruned.expected_macs <= by_layer.expected_macs
    assert [w.after for w in pruned.widths] != [w.after for w in by_layer.widths]
    again = prune(source, digits, baseline, tmp_path / "again", ratio=0.5, align=1, scope="curves", samples=32)
    assert again.widths == pruned.widths
    _, shrunk = finish(source, digits, baseline, pruned, tmp_path)
    assert (shrunk.params_after, shrunk.macs_after) == (pruned.expected_params, pruned.expected_macs)


@pytest.mark.parametrize(
    "settings", [{"method": "unstructured", "scope": s} for s in ("layer", "global")] + [{"method": "2:4"}], ids=str
)
def test_zeros_without_structure_pass_through_and_the_statement_says_so(source, digits, baseline, tmp_path, settings):
    pruned = prune(source, digits, baseline, tmp_path / "prune", ratio=0.5, **settings)
    weights = pruned.masks()
    share = sum(int((~m).sum()) for m in weights.values()) / sum(m.numel() for m in weights.values())
    assert share == pytest.approx(0.5, abs=0.02)
    folded, shrunk = finish(source, digits, baseline, pruned, tmp_path)
    assert folded.sparsity == pytest.approx(pruned.sparsity, abs=0.01)
    assert not shrunk.removed
    assert shrunk.params_after == shrunk.params_before
    assert "no speed-up" in shrunk.statement


def test_two_four_leaves_two_of_every_four_inputs(source, digits, baseline, tmp_path):
    pruned = prune(source, digits, baseline, tmp_path / "prune", method="2:4")
    mask = pruned.masks()["blocks.0.conv1.weight"]
    assert (mask.reshape(mask.shape[0], -1, 4, 3, 3).sum(2) == 2).all()


def test_overrides_reach_the_layer_they_name(source, digits, baseline, tmp_path):
    pruned = prune(source, digits, baseline, tmp_path / "p", ratio=0.5, align=1, overrides={"blocks.0.*": 0.0})
    after = {w.cluster: (w.before, w.after) for w in pruned.widths}
    assert after["blocks.0.conv1"] == (32, 32)
    assert after["blocks.2.conv1"] == (32, 16)


@pytest.mark.parametrize("block", [4, 8, 16])
def test_the_default_alignment_is_the_hosts_vector_block(source, digits, baseline, tmp_path, monkeypatch, block):
    monkeypatch.setattr("pipeline.selection.choose.vector_block", lambda: block)
    pruned = prune(source, digits, baseline, tmp_path / "p", ratio=0.4)
    wide = {w.cluster: (w.before, w.after) for w in pruned.widths if w.before > block}
    assert wide["blocks.0.conv1"] == (32, {4: 20, 8: 16, 16: 16}[block])  # 19.2 in whole blocks; halfway goes up
    assert all(after % block == 0 for _, after in wide.values())


def test_lower_norms_go_first(source, digits, baseline, tmp_path):
    """The groups that went have lower coupled norms than those that stayed."""
    from pipeline.channels import analyse, capture
    from pipeline.selection.criteria import CRITERIA, Evidence

    pruned = prune(source, digits, baseline, tmp_path / "p", ratio=0.5, align=1)
    model = source.build()
    model.load_state_dict(baseline.weights())
    analysis = analyse(capture(model, models.example(source)))
    import json

    removed = json.loads((pruned.folder / "removed.json").read_text())
    for cluster in analysis.clusters:
        norms = CRITERIA["l2"].score(cluster, Evidence(baseline.weights()))
        gone = removed[cluster.name]
        stays = [i for i in range(cluster.size) if i not in gone]
        assert norms[gone].max() <= norms[stays].min()


def test_folding_weights_that_the_masks_do_not_hold_is_an_error(source, digits, baseline, tmp_path, monkeypatch):
    pruned = prune(source, digits, baseline, tmp_path / "p", ratio=0.5)
    out = tmp_path / "tuned"
    out.mkdir()
    tuned = s2_finetune.run(FinetuneSection(recover="none"), out, source, digits, baseline, pruned, TASK, SILENT).save()
    real = masks.fold

    def forgetful(model):
        real(model)
        with torch.no_grad():
            next(iter(model.parameters())).add_(1e-3)

    monkeypatch.setattr(masks, "fold", forgetful)
    (tmp_path / "fold").mkdir()
    with pytest.raises(MaskError):
        s3_fold.run(FoldSection(), tmp_path / "fold", source, digits, pruned, tuned)


def test_folding_a_model_that_gives_nan_on_random_inputs_is_no_error():
    nan, one = torch.tensor([torch.nan, 1.0]), torch.tensor([torch.nan, 1.5])
    assert s3_fold._difference(nan, nan.clone()) == 0
    assert s3_fold._difference(nan, one) == 0.5
    assert s3_fold._difference(nan, torch.tensor([2.0, 1.0])) == torch.inf
    assert s3_fold._difference(torch.tensor([torch.inf]), torch.tensor([torch.inf])) == 0


def test_no_recovery_keeps_the_weights(source, digits, baseline, tmp_path):
    pruned = prune(source, digits, baseline, tmp_path / "p", ratio=0.5)
    out = tmp_path / "tuned"
    out.mkdir()
    tuned = s2_finetune.run(FinetuneSection(recover="none"), out, source, digits, baseline, pruned, TASK, SILENT)
    assert all(torch.equal(v, pruned.weights()[k]) for k, v in tuned.weights().items())


def test_a_foreign_pruned_checkpoint_is_shrunk_without_any_mask(source, digits, baseline, tmp_path):
    """Liveness needs the weights alone: rows, norm scale and shift of three channels are zero."""
    state = baseline.weights()
    for name in ("blocks.0.conv1.weight", "blocks.0.bn1.weight", "blocks.0.bn1.bias"):
        state[name][[1, 5, 9]] = 0.0

    for name in ("prune", "fold", "shrink"):
        (tmp_path / name).mkdir()
    settings = PruneSection(method="none")
    pruned = s1_prune.run(settings, tmp_path / "prune", source, digits, baseline, TASK, NOTHING, SILENT)
    save_tensors(state, tmp_path / "fold" / Folded.WEIGHTS)
    model = source.build()
    model.load_state_dict(state)
    zeros = sum(int((p == 0).sum()) for p in model.parameters())
    folded = Folded(
        folder=tmp_path / "fold", sparsity=0.0, zeros=zeros, params=baseline.params,
        score=evaluate(TASK, model, digits, "test").score, max_abs_diff_to_masked=0.0,
    )  # fmt: skip
    shrunk = s4_shrink.run(ShrinkSection(), tmp_path / "shrink", source, digits, pruned, folded, SILENT)
    widths = {w.cluster: (w.before, w.after) for w in shrunk.widths}
    assert widths["blocks.0.conv1"] == (32, 29)


@pytest.mark.parametrize("sides", ["one side", "both sides"])
def test_dead_channels_of_a_foreign_checkpoint_stay_where_a_count_is_asked_for(
    sides, source, digits, baseline, tmp_path, monkeypatch
):
    monkeypatch.setattr(s4_shrink, "vector_block", lambda: 16)
    state, gone = baseline.weights(), [1, 5, 9]
    for name in ("blocks.0.conv1.weight", "blocks.0.bn1.weight", "blocks.0.bn1.bias"):
        state[name][gone] = 0.0
    if sides == "both sides":
        state["blocks.0.conv2.weight"][:, gone] = 0.0
    save_tensors(state, tmp_path / "pruned.safetensors")
    lines, told = [], Progress()
    monkeypatch.setattr(told, "say", lines.append)

    def shrunk(folder, **settings):
        given = {"method": "given", "weights": str(tmp_path / "pruned.safetensors"), **settings}
        folder.mkdir()
        pruned = prune(source, digits, baseline, folder / "prune", **given)
        for name in ("finetune", "fold", "shrink"):
            (folder / name).mkdir()
        cfg = FinetuneSection(recover="none")
        tuned = s2_finetune.run(cfg, folder / "finetune", source, digits, baseline, pruned, TASK, SILENT)
        folded = s3_fold.run(FoldSection(), folder / "fold", source, digits, pruned, tuned).save()
        made = s4_shrink.run(ShrinkSection(), folder / "shrink", source, digits, pruned, folded, told)
        assert lines.pop().strip() == made.statement
        width = next(w for w in made.widths if w.cluster == "blocks.0.conv1")
        assert width.before == 32
        return width.after, made

    left, made = shrunk(tmp_path / "all")
    assert left == 29
    assert made.statement.endswith(
        "1 layer is left with counts of channels that kernels may be slow with (blocks.0.conv1: 29 of 32); with "
        "prune.align=16, 3 dead ones stay for even counts."
    )
    left, made = shrunk(tmp_path / "even", align=16)
    assert left == 32
    assert made.statement == (
        "Nothing was removed: 3 channel groups are dead, and stay (dead: 32 are faster than 29 where 16 channels are "
        "taken at once)."
    )
    assert any("3 groups of blocks.0.conv1" in line and "32 are faster than 29" in line for line in made.kept_back)
    left, made = shrunk(tmp_path / "one", align=1)
    assert left == 29


class Rolled(nn.Module):
    """The last channel alone is one input of the concatenation."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 10, 1)

    def forward(self, x):
        x = self.first(x)
        return self.second(torch.cat([x[:, 3:], x[:, :3]], 1)).mean((2, 3))


def test_what_is_dead_and_stays_because_a_tensor_would_become_empty_is_said_to_be_dead(digits, tmp_path):
    source = models.load(Rolled(), num_classes=10, input_size=digits.input_size)
    state = source.build().state_dict()
    state["first.weight"][3], state["first.bias"][3] = 0.0, 0.0
    save_tensors(state, tmp_path / Folded.WEIGHTS)
    folded = Folded.model_construct(
        folder=tmp_path, sparsity=0.0, params=sum(value.numel() for value in state.values())
    )
    pruned = Pruned.model_construct(folder=tmp_path, kinds=GroupSwitches(), method="structured", align=1)
    made = s4_shrink.run(ShrinkSection(), tmp_path, source, digits, pruned, folded, SILENT)
    assert made.statement == "Nothing was removed: 1 channel group is dead, and stays (a tensor would become empty)."
    assert "1 group of first: a tensor would become empty" in made.kept_back
