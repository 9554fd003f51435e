"""Images with masks: both come to one size, class numbers stay whole, what does not belong together is named."""

import numpy as np
import pytest
import torch
from PIL import Image

from foundation.errors import DataError
from pipeline import data
from pipeline.data.imagefolder import IMAGENET_MEAN, IMAGENET_STD

RNG = np.random.default_rng(0)
SIZE = (3, 16, 24)


def put(path, count=20, size=(48, 32), mode="L", start=0):
    """A bright square of class 1, and a frame of no class, on class 0."""
    for one in ("images", "masks"):
        (path / one).mkdir(parents=True, exist_ok=True)
    for n in range(count):
        mask = np.zeros((size[1], size[0]), np.uint8)
        top = 4 * (n % 4)
        mask[top : top + 12, 8:32] = 1
        pixels = np.repeat(mask[:, :, None] * 200, 3, 2) + np.uint8(start + n)
        mask[0, :] = 255
        Image.fromarray(pixels).save(path / "images" / f"{n:03}.png")
        Image.fromarray(mask).convert(mode).save(path / "masks" / f"{n:03}.png")
    return path


def test_images_and_masks_come_to_one_size(tmp_path):
    found = data.load(f"segmentation:{put(tmp_path)}", input_size=SIZE)
    assert found.names == ("0", "1")
    assert found.classes is None
    assert (found.mean, found.std, found.fit, found.augmentation) == (IMAGENET_MEAN, IMAGENET_STD, "stretch", None)
    for part in data.PARTS:
        for (images,), masks in found.batches(part, 8):
            assert images.shape[1:] == SIZE
            assert masks.shape[1:] == SIZE[1:]
            assert masks.dtype == torch.int64
            assert set(masks.unique().tolist()) <= {0, 1, -100}
            bright = images[:, 0] * IMAGENET_STD[0] + IMAGENET_MEAN[0] > 0.45
            known = masks >= 0
            assert float((bright[known] == (masks[known] == 1)).float().mean()) > 0.97


def test_masks_of_a_palette_and_names_of_classes(tmp_path):
    put(tmp_path, 4)
    (tmp_path / "classes.txt").write_text("ground\ncar\nnever seen\n")
    for file in (tmp_path / "masks").iterdir():
        mask = Image.fromarray(np.asarray(Image.open(file)))
        mask.putpalette([9, 9, 9, 200, 0, 0] + [0] * 762)
        mask.save(file)
    put(tmp_path / "images", 0)
    found = data.load(f"segmentation:{tmp_path}", input_size=SIZE)
    assert found.names == ("ground", "car", "never seen")


def test_parts_are_kept_and_copies_leave_training(tmp_path):
    put(tmp_path / "train")
    put(tmp_path / "test", 5, start=100)
    found = data.load(f"segmentation:{tmp_path}", input_size=SIZE)
    assert len(found.test) == 5
    put(tmp_path / "test", 5)
    assert "5 of the train samples also occur" in data.load(f"segmentation:{tmp_path}", input_size=SIZE).notes[0]


def image(pixels):
    return lambda path: Image.fromarray(pixels).save(path)


WRONG = {
    "another size": ("masks/003.png", image(np.zeros((32, 47), np.uint8)), r"3\.png has 47×32 pixels, and .*48×32"),
    "colours": ("masks/003.png", image(np.zeros((32, 48, 3), np.uint8)), r"3\.png is a mask of colours"),
    "no picture": ("masks/003.png", lambda path: path.write_text("x"), r"masks/003\.png is not a readable image"),
    "a damaged image": ("images/003.png", lambda path: path.write_bytes(path.read_bytes()[:60]), r"3\.png is not"),
    "no mask": ("masks/003.png", lambda path: path.unlink(), r"images/003\.png has no mask"),
    "no image": ("images/003.png", lambda path: path.unlink(), r"masks/003\.png has no image"),
    "twice": ("images/003.jpg", image(np.zeros((32, 48, 3), np.uint8)), "have the same name"),
    "beyond": ("masks/003.png", image(np.full((32, 48), 7, np.uint8)), r"holds the class 7, outside 0\.\.1"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_what_does_not_belong_together_is_named(tmp_path, case):
    name, change, says = case
    put(tmp_path)
    (tmp_path / "classes.txt").write_text("ground\ncar\n")
    change(tmp_path / name)
    with pytest.raises(DataError, match=says) as caught:
        data.load(f"segmentation:{tmp_path}", input_size=SIZE)
    assert "\n" not in str(caught.value)
    assert caught.value.hint


def test_a_class_beyond_those_first_seen_is_named_when_it_comes(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.data.segmentation.Masked.scanned", 3)
    put(tmp_path)
    image(np.full((32, 48), 9, np.uint8))(tmp_path / "masks" / "001.png")
    found = data.load(f"segmentation:{tmp_path}", input_size=SIZE)
    with pytest.raises(DataError, match=r"001\.png holds the class 9, outside 0\.\.1"):
        for part in data.PARTS:
            list(found.batches(part))


def test_folders_that_are_none_say_so(tmp_path):
    with pytest.raises(DataError, match="has no folder images"):
        data.load(f"segmentation:{tmp_path / 'nowhere'}")
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match="has no folder masks"):
        data.load(f"segmentation:{tmp_path}")
    (tmp_path / "masks").mkdir()
    with pytest.raises(DataError, match="is empty"):
        data.load(f"segmentation:{tmp_path}")
    put(tmp_path, 8)
    for file in (tmp_path / "masks").iterdir():
        image(np.zeros((32, 48), np.uint8))(file)
    with pytest.raises(DataError, match="a single class"):
        data.load(f"segmentation:{tmp_path}", input_size=SIZE)
