"""Recover the accuracy under the masks: in closed form first, then by as much training as helps."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from torch import nn

from foundation.errors import first_line
from foundation.files import replacing, save_tensors
from pipeline.artifacts.base import write_table
from pipeline.artifacts.eager import FITTED, Baseline, Finetuned, Pruned, Rung
from pipeline.channels.program.capture import Captured
from pipeline.data.parts import Data, Inputs
from pipeline.drawing.plots import history_plot
from pipeline.models.graph import graph_of
from pipeline.models.source import ModelSource
from pipeline.progress import Progress
from pipeline.recipe.train import FinetuneSection, TrainSettings
from pipeline.recovery import closed_form, ladder
from pipeline.recovery.pruned_size import PrunedSize, at_pruned_size
from pipeline.recovery.statistics import reestimate
from pipeline.selection.kinds import policy_of
from pipeline.tasks.evaluation import evaluate
from pipeline.tasks.task import Task
from pipeline.training import jobs, loop, masks, own
from pipeline.training.defaults import default_settings, has_batch_norm
from pipeline.training.history import Epoch, history_csv

EPOCHS = "training.epochs"
"""How many fit into the seconds of the recipe: kept, so that a run which was killed goes on to as many."""
TAUGHT = 0.5
"""Share of the loss that the dense model teaches, where the recipe says nothing; without labels it teaches all."""
GENTLE = 0.5
"""Of the learning rate that a pruned model takes: after a fit that came near, a careless epoch loses more than it
gains, and one that is too timid gains nothing (ResNet-18 at 0.15 of its MACs on MNIST, 96.6 % after the fit, four
epochs: 96.8 at a fifth, 97.1 at a half, 97.0 at the whole rate). From a fit that is still far off small steps do not
arrive: a detector that had 0.558 of 0.757 after the fit came to 0.668 in twelve epochs at a tenth, and to 0.735 at the
whole rate.
"""


def run(
    cfg: FinetuneSection,
    out: Path,
    source: ModelSource,
    data: Data,
    baseline: Baseline,
    pruned: Pruned,
    task: Task,
    progress: Progress,
) -> Finetuned:
    """Climb the ladder: closed form, batch norms' statistics, training with the masks held through every step.

    Where whole channels are masked and the model's own class can be the smaller model, that is trained, and its weights
    are written back: the same function at the price of the pruned one.
    A rung is kept only where the calibration part shows that it helps; what cannot help any more is not climbed.
    Training resumes from the last epoch after a kill. Raises MaskError when a masked weight is not zero, TrainingError
    when the loss is not finite.
    """
    chosen = pruned.masks()
    model = source.build()
    model.load_state_dict(pruned.weights())
    masks.apply(model, chosen)
    teacher = source.build()
    teacher.load_state_dict(baseline.weights())
    teacher.eval()
    graph = functools.cache(lambda: graph_of(teacher, source))
    dense, now = ladder.standing(teacher, data, task), ladder.standing(model, data, task)
    rungs = [Rung(name="pruned", score=now.score, seconds=0.0, kept=True, why="the masks alone")]
    fitted = False
    if cfg.recover != "none" and chosen and not ladder.level(now, dense):
        inputs = data.sample("train", cfg.samples)

        def fit() -> str:
            did = _closed_form(cfg, out, inputs, data, graph, model, teacher, chosen, progress)
            if baseline.trained_here:  # it is surer of the samples that it was trained on than of others
                return did
            others = data.sample("calibration", ladder.COMPARED)
            return "; ".join(filter(None, (did, ladder.few_samples(model, teacher, task, inputs, others))))

        made, now = ladder.climb("closed form", model, data, task, now, fit)
        fitted = made.kept
        if not fitted:
            (out / FITTED).unlink(missing_ok=True)  # what it tells is of no weight that is there
        rungs.append(made)
        if has_batch_norm(model) and not ladder.near(now, dense):
            made, now = ladder.climb(
                "batch norm",
                model,
                data,
                task,
                now,
                lambda: f"statistics of {reestimate(model, inputs)} norms taken anew",
            )
            rungs.append(made)
    settings = _settings(cfg, model, gentle=fitted and not ladder.far(now, dense), labelled=data.labelled)
    taught_by = teacher if settings.distill_weight > 0 else None
    small: PrunedSize | None = None
    near = ladder.within_noise(now, dense) if ladder.near(now, dense) else ""
    why = _no_training(cfg, settings, near)
    if not why:
        small, words = at_pruned_size(model, source.build(), graph(), chosen, policy_of(pruned.kinds))
        progress.say(f"  training at the pruned size: {words}" if small else f"  training under masks: {words}")
        if cfg.seconds is not None and cfg.loop is None:

            def timed() -> float:
                return loop.seconds_per_epoch(small.model if small else model, data, task, settings, taught_by)

            fitting = _within(cfg.seconds, timed, out / EPOCHS)
            settings = settings.model_copy(update={"epochs": min(settings.epochs, fitting)})
            why = _no_training(cfg, settings, near)
    history: tuple[Epoch, ...] = ()
    best_epoch, seconds = 0, 0.0
    if why:
        rungs.append(ladder.skipped("training", why))
    else:
        result: list[loop.TrainResult] = []

        def train() -> str:
            if cfg.loop is not None:
                trained, held = (small.model, small.masks) if small else (model, chosen)
                own.train(cfg.loop, trained, data, teacher=teacher, masks=held, seed=cfg.seed, progress=progress)
                if small:
                    small.write_back(model, masks.originals(small.model))
                return f"by {cfg.loop}"
            result.append(
                loop.train(
                    small.model if small else model,
                    data,
                    task,
                    settings,
                    teacher=taught_by,
                    masks=small.masks if small else chosen,
                    checkpoint=out / "training.pt",
                    progress=progress,
                )
            )
            if small:
                small.write_back(model, result[0].state)
            return f"{settings.epochs} epochs, the best kept"

        made, now = ladder.climb("training", model, data, task, now, train)
        rungs.append(made)
        seconds = made.seconds
        if result:
            history, seconds = result[0].history, result[0].seconds
            best_epoch = result[0].best_epoch if made.kept else 0
    for rung in rungs[1:]:
        progress.say(f"  {rung.name}: {rung.why}{'' if rung.kept or rung.score is None else '; taken back'}")
    history_csv(history, out / "history.csv")
    history_plot(history, best_epoch, out / "history.svg", task.score.name)
    for name in ("training.pt", EPOCHS):
        (out / name).unlink(missing_ok=True)
    save_tensors(masks.originals(model), out / Finetuned.WEIGHTS)
    return Finetuned(
        folder=out,
        rungs=tuple(rungs),
        epochs=len(history),
        best_epoch=best_epoch,
        score=evaluate(task, model, data, "test").score,
        calibration_score=now.score,
        training_seconds=seconds,
    )


def _settings(cfg: FinetuneSection, model: nn.Module, *, gentle: bool, labelled: bool) -> TrainSettings:
    """The recipe's settings, and for the rest what suits the model; gentle from weights that were fitted already."""
    taught = TAUGHT if labelled else 1.0
    section: dict[str, float | int] = {
        "distill_weight": taught if cfg.distill_weight is None else cfg.distill_weight,
        "distill_temperature": cfg.distill_temperature,
    }
    section |= {} if cfg.epochs is None else {"epochs": cfg.epochs}
    given = cfg.train.model_dump(exclude_unset=True) if cfg.train else {}
    made = default_settings(model, recovery=True, seed=cfg.seed)
    if gentle:
        made = made.model_copy(update={"lr": GENTLE * made.lr})
    return made.model_copy(update=section | given)


def _within(seconds: float, timed: Callable[[], float], kept: Path) -> int:
    """Epochs that fit into so many `seconds`, where one takes `timed()`; as a run that was killed `kept` them."""
    try:
        return int(kept.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        fitting = int(seconds / timed())
    with replacing(kept) as part:
        part.write_text(str(fitting), encoding="utf-8")
    return fitting


def _no_training(cfg: FinetuneSection, settings: TrainSettings, near: str) -> str:
    """Why nothing is trained, an own loop not called; "" where something is. `near`: what is said of a model that is as
    good as the dense one, "" of any other.
    """
    why = _not_trained(cfg, settings, near)
    return f"{why}; {cfg.loop} was not called" if why and cfg.loop is not None else why


def _not_trained(cfg: FinetuneSection, settings: TrainSettings, near: str) -> str:
    if cfg.recover != "train":
        return f"not asked for (recover = {cfg.recover!r})"
    if settings.epochs == 0:
        paid = cfg.seconds is not None and cfg.epochs != 0
        return f"{cfg.seconds:g} s do not pay for an epoch" if paid else "no epochs were asked for"
    asked = cfg.epochs is not None or (cfg.train is not None and "epochs" in cfg.train.model_fields_set)
    if asked or not near:
        return ""
    epochs = settings.epochs if cfg.loop is None else 1  # an own loop decides itself how many
    return f"not needed: {near} (--set finetune.epochs={epochs} asks for it all the same)"


def _closed_form(
    cfg: FinetuneSection,
    out: Path,
    inputs: Inputs,
    data: Data,
    graph: Callable[[], Captured],
    model: nn.Module,
    teacher: nn.Module,
    chosen: masks.Masks,
    progress: Progress,
) -> str:
    """Fit the weights of `model` in place to what `teacher` gives, and say how many; `graph`: that of both."""
    if len(inputs[0]) < closed_form.LEAST:
        return f"{len(inputs[0])} samples are too few to fit weights to"
    start = masks.originals(model)
    try:
        with jobs.handed_out(jobs.Fit(cfg.samples, cfg.seed), model, data, teacher):
            captured = graph()
            together, counted = closed_form.sharing(captured, inputs), data.counted(inputs)
            with progress.bar("closed form", len(list(captured.program.graph.nodes))) as bar:
                made = closed_form.recover(
                    captured,
                    chosen,
                    inputs,
                    start=start,
                    counted=counted,
                    seed=cfg.seed,
                    folder=out,
                    together=together,
                    tick=bar,
                )
    except ValueError as error:  # samples or a graph that nothing can be fitted with; the next rung has its turn
        return f"nothing fitted: {first_line(error)}"
    known = masks.originals(model)
    masks.load_originals(model, {name: made.state.get(name, value) for name, value in known.items()})
    write_table(out / FITTED, made.fitted)
    done = sum(not one.reason for one in made.fitted)
    return f"{done} weights fitted on {len(inputs[0])} samples without their labels in {made.seconds:.1f} s"
