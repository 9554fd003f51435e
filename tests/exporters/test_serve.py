"""The server in a bundle: what it answers, and that no image ends it."""

import json
import os
import subprocess
import sys
import wave

import numpy as np
import onnx
import pytest
from PIL import Image

from exporters import serve
from pipeline.data import imagefolder
from pipeline.data.audiofolder import recording
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
    assert done.stderr == "Give one readable folder: python serve.py FOLDER\n"


def test_pipes_and_folders_among_the_images_are_passed_over(bundle, tmp_path):
    photos = put(tmp_path / "photos", {})
    os.mkfifo(photos / "a.png")
    (photos / "b.png").mkdir()
    done, (line,) = served(bundle, photos)
    assert (done.returncode, line["file"]) == (0, "zz_last.png")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"shape": ["n", 12]}, "no image"),
        ({"shape": ["n", "channels", 2, 2]}, "no image"),
        ({"shape": []}, "no image"),
        ({"dtype": "int64"}, "no image"),
        ({"holds": "sound", "rate": 8000}, "no recording of a fixed length"),
        ({"mean": []}, "no mean and std for each channel"),
        ({"std": [1.0, 1.0]}, "no mean and std for each channel"),
    ],
)
def test_a_model_that_takes_no_images_is_one_line(bundle, tmp_path, change, said):
    reseal(bundle, lambda manifest: manifest["inputs"][0].update(change))
    done, _ = served(bundle, put(tmp_path / "photos", {}))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert said in done.stderr


def test_numbers_that_are_no_class_are_told_as_they_are_and_no_place_is_lost():
    told = serve.told(np.array([[-1, -1, -1], [2, 0, 0]]), "map", ["a", "b", "c"], None)
    assert told == {"shape": [2, 3], "counts": {"-1": 3, "c": 1, "a": 2}}
    told = serve.told(np.array([[0, 1, 1], [2, 3, 3]]), "map", ["a", "road", "road"], None)
    assert told["counts"] == {"a": 1, "road": 3, "3": 2}


def test_a_model_with_fewer_names_than_classes_still_answers(bundle, tmp_path):
    reseal(bundle, lambda manifest: manifest.update(labels=[]))
    done, (line,) = served(bundle, put(tmp_path / "photos", {}))
    assert done.returncode == 0
    assert line["label"] in "0123"


@pytest.fixture
def striding(tmp_path):
    """A bundle whose images have any even height and width; it says what their channels are on the average."""
    made = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 18]>
        g (float[n, 3, height, width] file) => (float[n, 3] y) {
            a = Resize <coordinate_transformation_mode = "asymmetric", mode = "nearest"> (file, , half)
            b = Resize <coordinate_transformation_mode = "asymmetric", mode = "nearest"> (a, , twice)
            c = Add (file, b)  d = Mul (c, scale)  m = GlobalAveragePool (d)  y = Flatten (m) }"""
    )
    for name, value in {"half": [1, 1, 0.5, 0.5], "twice": [1, 1, 2, 2], "scale": [0.5]}.items():
        made.graph.initializer.append(onnx.numpy_helper.from_array(np.array(value, np.float32), name))
    onnx.save(made, tmp_path / "free.onnx")
    x = np.ones((2, 3, 4, 6), np.float32) * np.array([1.0, 2.0, 3.0], np.float32).reshape(1, 3, 1, 1)
    return make(
        [variant(tmp_path / "free.onnx")],
        tmp_path / "free",
        inputs=[note(shape=("n", 3, "height", "width"), mean=(0.0,) * 3, std=(1.0,) * 3)],
        golden_inputs={"file": x},
        golden_outputs={"y": x.mean((2, 3))},
        answers={"y": "values"},
        sizes={"height": (4, 8), "width": (6, 12)},
        labels=[],
    ).path


def test_images_of_any_size_are_served_as_large_as_they_are(striding, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, size in {"a.png": (6, 4), "b.png": (14, 30), "c.png": (7, 5), "d.png": (2, 2)}.items():
        Image.new("RGB", size, (51, 102, 204)).save(photos / name)
    done, lines = served(striding, photos)
    assert done.returncode == 2
    for line in (lines[0], lines[1], lines[3]):
        assert line["values"] == pytest.approx([0.2, 0.4, 0.8], abs=1e-6)
    assert lines[2]["error"].startswith("the model does not take 7×5 pixels (proven at height 4 or 8, width 6 or 12)")


def test_a_side_that_is_free_follows_the_one_that_is_not():
    image = Image.new("L", (30, 20))
    assert serve.sides(image, 10, "width") == (15, 10)
    assert serve.sides(image, "height", 60) == (60, 40)
    assert serve.sides(image, "height", "width") == (30, 20)
    assert serve.sides(image, 7, 9) == (9, 7)
    with pytest.raises(ValueError, match="too narrow"):
        serve.sides(Image.new("L", (100_000, 1)), 224, "width")


@pytest.fixture
def listening(tmp_path):
    """A bundle whose model gives the recording itself, 6 samples at 8,000 per second."""
    made = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 18]>
        g (float[n, 1, 6] sound) => (float[n, 6] y) { y = Flatten (sound) }"""
    )
    onnx.save(made, tmp_path / "sound.onnx")
    x = np.linspace(-1, 1, 12, dtype=np.float32).reshape(2, 1, 6)
    return make(
        [variant(tmp_path / "sound.onnx")],
        tmp_path / "listening",
        inputs=[note(name="sound", shape=("n", 1, 6), mean=(), std=(), holds="sound", rate=8000)],
        golden_inputs={"sound": x},
        golden_outputs={"y": x[:, 0]},
        answers={"y": "values"},
        labels=[],
    ).path


def wav(file, samples, width=2, rate=8000):
    """Whole numbers (samples[, channels]) as a recording of so many bytes each."""
    samples = np.asarray(samples)
    with wave.open(str(file), "wb") as out:
        out.setparams((1 if samples.ndim == 1 else samples.shape[1], width, rate, 0, "NONE", ""))
        wide = samples.astype("<i8").reshape(-1, 1).view(np.uint8)[:, :width] if width > 1 else samples.astype(np.uint8)
        out.writeframes(wide.tobytes())


def test_recordings_are_served_as_they_are_trained_on(listening, tmp_path):
    folder = tmp_path / "sounds"
    folder.mkdir()
    drawn = np.random.default_rng(3).uniform(-1, 1, 8)
    wav(folder / "a.wav", (drawn * 2**15).astype(int))
    wav(folder / "b.wav", (drawn[:4] * 2**23).astype(int), width=3)
    wav(folder / "c.wav", (drawn[:6] * 2**31).astype(int), width=4)
    wav(folder / "d.wav", 128 + (drawn[:6] * 127).astype(int), width=1)
    wav(folder / "e.WAV", np.stack([(drawn * 2**15).astype(int), np.zeros(8, int)], 1))
    done, lines = served(listening, folder)
    assert done.returncode == 0, done.stdout
    for line in lines:
        wanted = recording(str(folder / line["file"]), 8000, 6)[0]
        assert line["values"] == pytest.approx(wanted.tolist(), abs=1e-6), line["file"]


def test_what_is_no_recording_for_this_model_is_a_line_and_those_after_it_are_served(listening, tmp_path):
    folder = tmp_path / "sounds"
    folder.mkdir()
    wav(folder / "a.wav", [1] * 12, rate=16_000)
    wav(folder / "b.wav", [])
    wav(folder / "c.wav", [1] * 6)
    (folder / "c.wav").write_bytes((folder / "c.wav").read_bytes()[:-3])
    (folder / "d.wav").write_bytes(b"RIFF")
    Image.new("RGB", (4, 4)).save(folder / "e.png")
    (folder / "f.jsonl").write_text(json.dumps({"sound": [[0.5] * 6]}))
    wav(folder / "g.wav", [0] * 6)
    done, lines = served(listening, folder)
    assert done.returncode == 2
    assert "it has 16000 samples per second, and the model takes 8000: resample it first" in lines[0]["error"]
    assert "it holds no sample" in lines[1]["error"]
    assert "cut short" in lines[2]["error"]
    assert all("no .wav file of PCM" in line["error"] for line in lines[3:5])
    assert [line["values"] for line in lines[5:]] == [[0.5] * 6, [0.0] * 6]


@pytest.mark.parametrize("rate", [0, -1, "fast", 8000.0])
def test_a_rate_that_is_none_is_found_by_the_self_test(listening, tmp_path, rate):
    reseal(listening, lambda manifest: manifest["inputs"][0].update(rate=rate))
    done, _ = served(listening, put(tmp_path / "photos", {}))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "rate of an input cannot be" in done.stderr
