"""Every command of the pages that starts several processes, run with two on this machine's CPU."""

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from pipeline.recipe import config
from tests.pipeline.chain import TINY
from tests.pipeline.training.two import free_port

ROOT = Path(__file__).resolve().parents[3]
IMAGENET = ROOT / "examples" / "imagenet"
PAGES = [ROOT / "docs" / "training.md", IMAGENET / "README.md", IMAGENET / "imagenet.slurm"]
SMALL = [
    "--set", f"model={TINY}:build", "--input-size", "3,16,16", "--name", "tiny", "--weights", "train",
    "--set", "baseline.train={epochs=1}", "--set", "baseline.seconds=0.05",
    "--set", "finetune.train={epochs=1, batch_size=16, precision=\"float32\"}",
]  # fmt: skip


def launches(page: Path) -> list[str]:
    text = page.read_text().replace("\\\n", " ")
    return [" ".join(line.split()) for line in text.splitlines() if re.match(r"\s*(torchrun|accelerate|srun) ", line)]


LINES = [(page.name, line) for page in PAGES for line in launches(page)]


def of(page: str) -> list[str]:
    return [line for name, line in LINES if name == page]


def launcher(line: str) -> str:
    return line.split()[0]


BIN = Path(sys.executable).parent
ALONE = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}


def words_of(line: str) -> list[str]:
    """The line with two processes, and a port that is free; the model is named by what stands behind."""
    words = [word for word in shlex.split(line) if word != "resnet50"]
    for option in ("--nproc-per-node", "--num_processes"):
        if option in words:
            words[words.index(option) + 1] = "2"
    at, option = (1, "--master-port") if words[0] == "torchrun" else (2, "--main_process_port")
    return [*words[:at], option, str(free_port()), *words[at:]]


def run(line: str, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    words = [*words_of(line), *SMALL, *more, "--out", str(folder)]
    return subprocess.run(words, cwd=ROOT, env=ALONE, capture_output=True, text=True, timeout=250, check=False)


@pytest.fixture
def photos(tmp_path) -> Path:
    """Ten classes of a few images."""
    draw = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 3)):
        for label in range(10):
            folder = tmp_path / "photos" / part / str(label)
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 256, (16, 16, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "photos"


def test_the_pages_show_both_launchers():
    assert [line.split()[0] for _, line in LINES] == [
        "torchrun",
        "accelerate",
        "accelerate",
        "torchrun",
        "accelerate",
        "srun",
    ]


def test_the_recipe_for_imagenet_is_one_and_its_batch_feeds_sixteen_gpus():
    recipe = config.load(IMAGENET / "recipe.toml")
    assert recipe.finetune.train is not None
    assert recipe.finetune.train.batch_size % 16 == 0


@pytest.mark.examples
@pytest.mark.parametrize("line", of("training.md"), ids=launcher)
def test_a_launch_of_the_docs_trains_with_two_processes(tmp_path, line):
    done = run(line, tmp_path / "made", "--until", "baseline")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("training: epoch 1/1") == 1
    assert (tmp_path / "made" / "tiny" / ".partial" / "0-baseline" / "history.csv").exists()


@pytest.mark.examples
def test_weights_in_pieces_are_trained_at_the_pruned_size_and_refused_under_masks(tmp_path):
    (line,) = (line for line in of("training.md") if "--use_fsdp" in line)
    done = run(line, tmp_path / "made", "--until", "finetune")
    assert done.returncode == 0, done.stderr
    assert "training at the pruned size" in done.stderr
    assert done.stderr.count("training: epoch 1/1") == 2
    done = run(line, tmp_path / "made", "--until", "finetune", "--set", "prune.method=unstructured")
    assert done.returncode != 0
    lines = [one for one in done.stderr.splitlines() if one.startswith("error:")]
    assert len(lines) == 1 and "masks need every weight whole on each process" in lines[0], done.stderr
    assert "-> Launch without it" in done.stderr


@pytest.mark.examples
@pytest.mark.parametrize("line", of("README.md"), ids=launcher)
def test_imagenets_recipe_runs_on_two_processes(tmp_path, photos, line):
    done = run(line, tmp_path / "made", "--data", f"imagefolder:{photos}", "--until", "finetune")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("training: epoch 1/1") == 2
    assert (tmp_path / "made" / "tiny" / ".partial" / "2-finetune" / "history.csv").exists()


@pytest.mark.examples
def test_the_slurm_file_starts_one_launcher_per_node(tmp_path, photos):
    """With two nodes of one process each: `srun` and `scontrol` are stood in for."""
    fakes = tmp_path / "fakes"
    fakes.mkdir()
    words = shlex.join(
        [*SMALL, "--data", f"imagefolder:{photos}", "--until", "finetune", "--out", str(tmp_path / "made")]
    )
    (fakes / "scontrol").write_text("#!/bin/sh\necho 127.0.0.1\n")
    (fakes / "srun").write_text(f'#!/bin/sh\n"$@" {words} &\n"$@" {words} &\nwait\n')
    for fake in fakes.iterdir():
        fake.chmod(0o755)
    script = (IMAGENET / "imagenet.slurm").read_text().replace("29500", str(free_port()))
    environment = {
        **ALONE, "PATH": f"{fakes}:{ALONE['PATH']}", "SLURM_JOB_NODELIST": "here[1-2]", "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_ID": "7",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("training: epoch 1/1") == 2, done.stderr
    assert (tmp_path / "made" / "tiny" / ".partial" / "2-finetune" / "history.csv").exists()


@pytest.mark.examples
def test_a_process_killed_under_torchrun_ends_the_run_with_our_line(tmp_path):
    words = [*words_of(LINES[0][1]), *SMALL, "--set", "baseline.train={epochs=500}", "--until", "baseline"]
    words += ["--out", str(tmp_path)]
    checkpoint = tmp_path / "tiny" / ".partial" / "0-baseline.building" / "training.pt"
    with subprocess.Popen(words, cwd=ROOT, env=ALONE, stderr=subprocess.PIPE, text=True) as started:
        while not checkpoint.exists():
            assert started.poll() is None
            time.sleep(0.01)
        children = psutil.Process(started.pid).children(recursive=True)
        ranks = [one for one in children if one.environ().get("RANK") == "1"]
        ranks[0].kill()
        began = time.monotonic()
        assert started.stderr is not None
        text = started.stderr.read()
        assert started.wait(30) != 0
        assert time.monotonic() - began < 30
    lines = [line for line in text.splitlines() if line.startswith("error:")]
    assert lines == ["error: Process 1 of 2 has ended: it was killed, or its machine was lost."]
