"""What our training loop costs: `python benchmarks/training_loop.py [--model resnet50] [--rounds N] [--batch N]`.

One epoch on the digits at 32x32, one thread, in batches of 64 (or --batch), in each of these ways, in turn, round after
round:

bare   a plain PyTorch loop with the same model, data, optimizer, schedule, clipping, and the same pass over the
       calibration part at the end of the epoch
ours   pipeline.training.loop on one process
bf16   ours in bf16, where the processor has it
two    ours on two processes of one thread each

Told are wall and processor seconds of an epoch (medians), both over those of `bare`, and the peak memory of a process
that did nothing else. Every epoch of `two` runs in processes of its own, as every other one does. On a machine that has
other work to do, trust the processor seconds of the first three, and neither of `two`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

WAYS = ("bare", "ours", "bf16", "two")


def main() -> int:
    """Take the ways in turn; exit 0 when all of them ran."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=640, help="of the training part, in an epoch")
    parser.add_argument("--batch", type=int, default=64, help="samples in a step, of all processes together")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=WAYS)
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        measure(args.one, args.model, args.samples, args.batch)
        return 0
    seen: dict[str, list[dict[str, float]]] = {way: [] for way in args.ways}
    for number in range(args.rounds):
        for way in args.ways if number % 2 else reversed(args.ways):
            found = run(way, args.model, args.samples, args.batch)
            if found is not None:
                seen[way].append(found)
    base = middle(seen["bare"]) if seen.get("bare") else None
    print(f"{args.model}, {args.samples} samples in batches of {args.batch}, {args.rounds} rounds")
    print(f"{'':6}{'wall s':>10}{'/ bare':>9}{'cpu s':>10}{'/ bare':>9}{'peak MB':>10}{'/ bare':>9}")
    for way, runs in seen.items():
        if not runs:
            print(f"{way:6}  not run: this processor has none, or it failed")
            continue
        now = middle(runs)
        cells = ""
        for key, width in (("wall", 3), ("cpu", 3), ("peak", 0)):
            cells += f"{now[key]:>10.{width}f}" + (f"{now[key] / base[key]:>9.3f}" if base else " " * 9)
        print(f"{way:6}{cells}")
    return 0


def middle(runs: list[dict[str, float]]) -> dict[str, float]:
    """The median of each figure."""
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def run(way: str, model: str, samples: int, batch: int) -> dict[str, float] | None:
    """One epoch in processes of its own; None where it cannot be."""
    words = [sys.executable, __file__, "--one", way, "--model", model]
    words += ["--samples", str(samples), "--batch", str(batch)]
    count = 2 if way == "two" else 1
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    started = []
    for rank in range(count):
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
        given = {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in places.items()} if count > 1 else {}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **given}
        started.append(subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment))
    outputs = [process.communicate()[0] for process in started]
    return json.loads(outputs[0].splitlines()[-1]) if all(process.returncode == 0 for process in started) else None


def measure(way: str, spec: str, samples: int, batch: int) -> None:
    """Train one epoch and print what it took; the first steps of a process are warm-up, done before."""
    from pipeline import data, models
    from pipeline.recipe.train import TrainSettings
    from pipeline.recovery.following import follow
    from pipeline.tasks import classification
    from pipeline.training import jobs, launched, loop, processes

    source = models.load(spec, num_classes=10, input_size=(3, 32, 32), seed=0)
    task = classification.task("classification", "output")
    digits = data.load("digits", input_size=(3, 32, 32))
    settings = TrainSettings(epochs=1, batch_size=batch, threads=1, precision="bf16" if way == "bf16" else "float32")
    if way == "bf16":
        loop._Run.check_faster = lambda self: None  # what it costs is what is asked here
    part, warm = digits.some("train", samples), digits.some("train", 2 * batch)
    place = launched.place()
    train = bare if way == "bare" else ours
    if place is None:
        train(source.build(), warm, task, settings)
        told(*train(source.build(), part, task, settings))
        return
    with processes.joined(place) as group:
        if group.leads:
            train(source.build(), warm, task, settings)
            jobs.over()
        else:
            follow(source, warm, task)
        if group.leads:
            found = train(source.build(), part, task, settings)
            jobs.over()
        else:
            follow(source, part, task)
    if place.rank == 0:
        told(*found)


def told(wall: float, cpu: float) -> None:
    """Print the figures, with this process's peak memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"wall": wall, "cpu": cpu, "peak": peak}))


def ours(model, part, task, settings) -> tuple[float, float]:
    """Wall and processor seconds of our loop; on several processes, of the epoch itself, not of handing out the job."""
    from pipeline.training import launched, loop

    wall, cpu = time.perf_counter(), time.process_time()
    made = loop.train(model, part, task, settings)
    within = time.perf_counter() - wall
    return (made.history[0].seconds if launched.place() else within), time.process_time() - cpu


def bare(model, part, task, settings) -> tuple[float, float]:
    """Wall and processor seconds of a loop as anybody would write it."""
    import torch
    import torch.nn.functional as F

    from pipeline.training.loop import learning_rate

    torch.set_num_threads(1)
    wall, cpu = time.perf_counter(), time.process_time()
    matrices = [one for one in model.parameters() if one.ndim >= 2]
    others = [one for one in model.parameters() if one.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
        betas=(settings.momentum, 0.999), fused=True,
    )  # fmt: skip
    total = len(part.train) // settings.batch_size
    model.train()
    torch.manual_seed(0)
    lost, right = 0.0, 0
    batches = part.batches("train", settings.batch_size, True, 1, augment=True, drop_last=True)
    for step, ((images,), labels) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step, total)
        optimizer.zero_grad()
        logits = model(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=settings.label_smoothing)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        optimizer.step()
        lost += loss.item()
        right += int((logits.argmax(1) == labels).sum())
    model.eval()
    with torch.no_grad():
        for (images,), labels in part.batches("calibration", task.batch):
            logits = model(images)
            lost += F.cross_entropy(logits, labels).item()
            right += int((logits.argmax(1) == labels).sum())
    best = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(best)
    return time.perf_counter() - wall, time.process_time() - cpu


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.exit(main())
