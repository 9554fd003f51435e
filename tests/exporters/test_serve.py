"""The server in a bundle: what it answers, and that no image ends it."""

import json
import os
import subprocess
import sys

import numpy as np
import onnx
import pytest
from PIL import Image

from exporters import serve
from pipeline.data import imagefolder
from pipeline.data.imagefolder import ImageFiles
from tests import hostile_images
from tests.exporters.bundles import WEIGHT, linear, make, note, reseal, variant

SIDE = 224


@pytest.fixture
def bundle(tmp_path):
    return make([variant(linear(tmp_path / "linear.onnx"))], tmp_path / "bundle").path


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A bundle whose images are as large as usual."""
    folder = tmp_path_factory.mktemp("large")
    made = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["" : 18]>
        g (float[n, 3, {SIDE}, {SIDE}] file) => (float[n, 3] y) {{ m = GlobalAveragePool (file)  y = Flatten (m) }}"""
    )
    onnx.save(made, folder / "mean.onnx")
    x = np.random.default_rng(0).random((2, 3, SIDE, SIDE)).astype(np.float32)
    options = {"golden_inputs": {"file": x}, "golden_outputs": {"y": x.mean((2, 3))}, "labels": ["r", "g", "b"]}
    return make(
        [variant(folder / "mean.onnx")], folder / "bundle", inputs=[note(shape=("n", 3, SIDE, SIDE))], **options
    ).path


def served(bundle, photos, *options):
    done = subprocess.run(
        [sys.executable, *options, str(bundle / "serve.py"), str(photos)], capture_output=True, text=True, timeout=250
    )
    return done, [json.loads(line) for line in done.stdout.splitlines()]


def put(folder, files):
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    Image.fromarray(np.full((4, 4, 3), (9, 200, 9), np.uint8)).save(folder / "zz_last.png")
    return folder


def test_a_bundle_serves_a_folder_of_images(bundle, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    pixels = np.random.default_rng(2).integers(0, 256, (2, 2, 3), np.uint8)
    Image.fromarray(pixels).save(photos / "a.png")
    command = [sys.executable, "-B", "-m", "serve", str(photos)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=bundle)
    assert done.returncode == 0, done.stderr
    (photos / "b.txt").write_text("no image")
    done = subprocess.run(command, capture_output=True, text=True, cwd=bundle)
    assert done.returncode == 2, done.stderr
    first, second = map(json.loads, done.stdout.splitlines())
    logits = ((pixels.transpose(2, 0, 1) / 255 - 0.5) / 0.25).reshape(12) @ WEIGHT
    assert first["file"] == "a.png"
    assert first["label"] == "abcd"[logits.argmax()]
    assert first["share"] == pytest.approx(np.exp(logits.max()) / np.exp(logits).sum(), abs=1e-3)
    assert second["file"] == "b.txt"
    assert "error" in second
    reseal(bundle, lambda manifest: manifest["files"].update({"model.onnx": "0" * 64}))
    done = subprocess.run(command, capture_output=True, text=True, cwd=bundle)
    assert done.returncode == 1
    assert "model.onnx is missing" in done.stderr


def test_no_image_ends_the_server(large, tmp_path):
    """One line for each, the last image served, and the exit code says that some were not."""
    photos = put(tmp_path / "photos", hostile_images.refused())
    done, lines = served(large, photos)
    assert (done.returncode, done.stderr) == (2, "")
    assert [line["file"] for line in lines] == sorted(path.name for path in photos.iterdir())
    *others, last = lines
    assert {line["file"] for line in others if "error" not in line} == set()
    assert all(line["error"] and len(line["error"]) <= 200 for line in others)
    assert last["label"] == "g"


def test_damaged_images_of_every_format_end_nothing(large, tmp_path):
    photos = put(tmp_path / "photos", hostile_images.damaged())
    done, lines = served(large, photos)
    assert (done.returncode, done.stderr) == (2, "")
    assert len(lines) == len(list(photos.iterdir()))
    assert lines[-1]["label"] == "g"


def test_unusual_images_are_served_as_they_are_trained_on(large, tmp_path):
    """The same numbers as an image folder gives, whatever the format and the mode."""
    photos = put(tmp_path / "photos", hostile_images.unusual())
    done, lines = served(large, photos)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert lines[-1]["label"] == "g"
    spec = {"shape": ["n", 3, SIDE, SIDE], "mean": [0.5] * 3, "std": [0.25] * 3}
    names = sorted(path.name for path in photos.iterdir())
    trained = ImageFiles([(str(photos / name), 0) for name in names], (3, SIDE, SIDE))
    for name, (pixels, _) in zip(names, trained, strict=False):
        wanted = (pixels.numpy()[None] / np.float32(255) - 0.5) / 0.25
        np.testing.assert_allclose(serve.read(photos / name, spec), wanted, atol=1e-5, err_msg=name)
        if name.startswith("grey16"):
            assert float(pixels.float().mean()) == hostile_images.GREY16 >> 8


def test_the_server_and_the_image_folder_read_the_same_formats_and_sizes():
    assert (serve.FORMATS, serve.PIXELS) == (imagefolder.FORMATS, imagefolder.PIXELS)


@pytest.mark.parametrize("words", [[], ["nowhere"], ["a", "b"], [__file__]])
def test_without_a_folder_it_says_so(bundle, words):
    done = subprocess.run([sys.executable, str(bundle / "serve.py"), *words], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "Give one readable folder of images: python serve.py FOLDER\n"


def test_pipes_and_folders_among_the_images_are_passed_over(bundle, tmp_path):
    photos = put(tmp_path / "photos", {})
    os.mkfifo(photos / "a.png")
    (photos / "b.png").mkdir()
    done, (line,) = served(bundle, photos)
    assert (done.returncode, line["file"]) == (0, "zz_last.png")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"shape": ["n", 12]}, "no image of a fixed size"),
        ({"shape": ["n", 3, "height", "width"]}, "no image of a fixed size"),
        ({"shape": []}, "no image of a fixed size"),
        ({"dtype": "int64"}, "no image of a fixed size"),
        ({"mean": []}, "no mean and std for each channel"),
        ({"std": [1.0, 1.0]}, "no mean and std for each channel"),
    ],
)
def test_a_model_that_takes_no_images_is_one_line(bundle, tmp_path, change, said):
    reseal(bundle, lambda manifest: manifest["inputs"][0].update(change))
    done, _ = served(bundle, put(tmp_path / "photos", {}))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert said in done.stderr


def test_a_model_with_fewer_names_than_classes_still_answers(bundle, tmp_path):
    reseal(bundle, lambda manifest: manifest.update(labels=[]))
    done, (line,) = served(bundle, put(tmp_path / "photos", {}))
    assert done.returncode == 0
    assert line["label"] in "0123"
