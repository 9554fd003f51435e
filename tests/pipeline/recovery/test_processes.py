"""The fit over two gloo processes, each with its part of the samples: what one fits, up to the order of sums."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from foundation.errors import TrainingError
from pipeline.channels.program.capture import Captured, capture
from pipeline.models.graph import graph_of
from pipeline.progress import Progress
from pipeline.recipe.train import FinetuneSection
from pipeline.recovery import closed_form
from pipeline.recovery.closed_form import ClosedForm, recover
from pipeline.recovery.walk import Walk
from pipeline.stages import s2_finetune
from pipeline.training import devices, launched, masks, processes
from pipeline.training.devices import Together
from tests.pipeline.recovery import test_attention as attention
from tests.pipeline.recovery import test_behind as behind
from tests.pipeline.recovery import test_closed_form as whole
from tests.pipeline.recovery import test_recurrent as recurrent
from tests.pipeline.training.test_processes import digits, source
from tests.pipeline.training.two import led, together

Case = tuple[str, Captured, Mapping[str, Tensor], tuple[Tensor, ...], Tensor | None]
SAMPLES = 121
"""Four chunks, one of them shorter."""


def cases(*names: str) -> Iterator[Case]:
    """(name, network, masks, samples, places that count) for every kind of fit."""
    for name in whole.NETS:
        if not names or name in names:
            captured, inputs = whole.built(name, SAMPLES)
            yield name, captured, whole.cut(captured), inputs, None
    for name, activation in (("behind a cut", "relu"), ("behind a curve", "silu")):
        if not names or name in names:  # more places than a shift is found on
            captured, gone, x = behind.made_of("norm", activation, count=SAMPLES, side=12)
            yield name, captured, gone, (x,), None
    if not names or "single weights" in names:
        captured, inputs = whole.built("mlp", SAMPLES)
        draw = torch.Generator().manual_seed(0)
        thin = {name: torch.rand(captured.state[name].shape, generator=draw) > 0.5 for name in ("2.weight", "4.weight")}
        yield "single weights", captured, thin, inputs, None
    if not names or "places that count" in names:
        torch.manual_seed(0)
        net = whole.Tokens().eval()
        held = torch.arange(30) < torch.randint(2, 8, (SAMPLES, 1))
        ids = torch.where(held, torch.randint(0, 20, (SAMPLES, 30)), torch.randint(20, 40, (SAMPLES, 30)))
        captured = capture(net, (ids[:3], held[:3].long()), dynamic_batch=True)
        yield "places that count", captured, whole.cut(captured), (ids, held.long()), held
    for name in ("operator", "packed", "grouped inside") if not names else ():
        model, x = attention.built(name), attention.sequences(SAMPLES)
        gone = attention.masks_of(model, torch.arange(attention.SIZE) % 3 > 0)
        yield f"scores, {name}", capture(model, (x[:3],)), gone, (x,), None
    for name in ("lstm, two layers in both directions", "lstm, projected", "gru") if not names else ():
        model, x = recurrent.built(name)
        captured = capture(model, (x[:3],))
        yield name, captured, recurrent.cut(captured, 0.5), (x[:SAMPLES],), None


def fitted(case: Case, how: Together) -> ClosedForm:
    _, captured, held, inputs, counted = case
    return recover(captured, held, inputs, counted=counted, together=how)


def joined(work: Callable[..., Any], *args: Any) -> Any:
    """In a process of two: `work(*args)`."""
    place = launched.place()
    assert place is not None
    with processes.joined(place):
        return work(*args)


def on_two(names: tuple[str, ...]) -> dict[str, ClosedForm]:
    return {case[0]: fitted(case, devices.together()) for case in cases(*names)}


def outputs(case: Case, made: ClosedForm) -> Tensor:
    _, captured, held, inputs, _ = case
    torch.manual_seed(0)
    own = captured.with_state({key: value.clone() for key, value in made.state.items()})  # some write into buffers
    found: Tensor = own.fold(held)(*(x.clone() for x in inputs))
    return found


def alike(tmp_path: Path, *names: str) -> None:
    every = list(cases(*names))
    results = together(tmp_path, joined, on_two, names, seconds=250)
    for case in every:
        name, alone = case[0], fitted(case, devices.ALONE)
        for rank, found in enumerate(results):
            assert found is not None, (tmp_path / f"stderr{rank}").read_text()
            made = found[name]
            assert any(not one.reason for one in made.fitted)
            for one, other in zip(made.fitted, alone.fitted, strict=True):
                same = replace(other, error_before=one.error_before, error_after=one.error_after)
                assert one == same, name
                assert one.error_after == pytest.approx(other.error_after, rel=1e-3, abs=1e-6), name
            torch.testing.assert_close(outputs(case, made), outputs(case, alone), rtol=1e-3, atol=1e-3)
            if "scores" in name:  # one rounding of the samples moves these weights by a thousandth
                continue
            for key, value in made.state.items():
                torch.testing.assert_close(value, alone.state[key], rtol=2e-4, atol=2e-4)
        a, b = (found[name].state for found in results)
        assert all(torch.equal(a[key], b[key]) for key in a), name


def test_two_processes_fit_what_one_does(tmp_path):
    alike(tmp_path, "residual", "mlp", "behind a cut", "single weights")


@pytest.mark.examples
def test_every_kind_of_fit_is_the_same_on_two_processes(tmp_path):
    alike(tmp_path)


def failing(rank: int) -> tuple[str, str]:
    """A node that one process cannot run: what both raise, and whether the next fit is as ever."""
    case = next(cases("mlp"))
    visit, left = Walk.visit, 3

    def broken(self: Walk, node: Any) -> None:
        nonlocal left
        left -= 1
        if not left and devices.rank() == rank:
            raise ValueError("it does not take them")
        visit(self, node)

    Walk.visit = broken
    said = ""
    try:
        fitted(case, devices.together())
    except ValueError as error:
        said = f"{type(error).__name__}: {error}"
    return said, "" if fitted(case, devices.together()).fitted else "nothing"


def test_what_one_process_cannot_do_both_leave_with_its_reason(tmp_path):
    first, second = together(tmp_path, joined, failing, 1)
    assert first == ("Elsewhere: it does not take them", "")
    assert second == ("ValueError: it does not take them", "")


def apart() -> str:
    """One adds up more than the other."""
    try:
        devices.together().added(torch.zeros(3 + devices.rank()))
    except TrainingError as error:
        return str(error)
    return ""


def test_processes_that_come_apart_end_instead_of_waiting_for_ever(tmp_path):
    assert all("come apart" in said for said in together(tmp_path, joined, apart))


def test_fewer_batches_than_processes_are_one_process_s(monkeypatch):
    captured, inputs = whole.built("mlp", SAMPLES)
    monkeypatch.setattr(closed_form, "everybody", lambda: Together(0, 4))
    assert closed_form.sharing(captured, inputs).count == 4
    monkeypatch.setattr(closed_form, "everybody", lambda: Together(0, 5))
    assert closed_form.sharing(captured, inputs) is devices.ALONE


def test_each_has_neighbouring_batches_and_all_of_them_are_had():
    for count in (4, 5, 9):
        parts = [Together(rank, 4).mine(count) for rank in range(4)]
        assert [at for part in parts for at in part] == list(range(count))
        assert all(parts)


def pruned(folder: Path) -> dict[str, Tensor]:
    """What stage 2's closed form makes of a network on digits, of which half the channels of a layer are masked."""
    made, known = source(), digits()
    model, teacher = made.build(), made.build().eval()
    gone = torch.arange(8) % 2 == 0
    held = {"conv.weight": gone.reshape(8, 1, 1, 1).expand(8, 1, 3, 3), "bn.weight": gone, "bn.bias": gone}
    held["fc.weight"] = gone.expand(10, 8)
    masks.apply(model, held)
    cfg = FinetuneSection(samples=200)
    inputs = known.sample("train", cfg.samples)

    def graph() -> Captured:
        return graph_of(teacher, made)

    said = s2_finetune._closed_form(cfg, folder, inputs, known, graph, model, teacher, held, Progress())
    assert said.startswith("2 weights fitted on 200 samples"), said
    return masks.originals(model)


def led_by_stage(folder: Path) -> Any:
    seen = []
    closed_form.recover = lambda *args, **given: (seen.append(given["together"].count), recover(*args, **given))[1]
    found = led(source(), digits(), None, lambda: pruned(folder))
    assert seen == [2]
    return found


def test_the_stage_hands_the_fit_to_the_other_processes(tmp_path):
    alone = pruned(tmp_path)
    first, second = together(tmp_path / "two", led_by_stage, tmp_path)
    assert first is not None, (tmp_path / "two" / "stderr0").read_text()
    assert second is None and (tmp_path / "two" / "result1.pt").exists()
    assert not torch.equal(alone["fc.weight"], source().build().fc.weight)
    for name, value in alone.items():
        torch.testing.assert_close(first[name], value, rtol=2e-4, atol=2e-4)
