"""Images with boxes: boxes follow their image's size, categories are numbered from 0, bad annotations are named."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from foundation.errors import DataError
from pipeline import data

SIZE = (3, 32, 32)


def content(count=20):
    return {
        "images": [{"id": 100 + n, "file_name": f"{n}.png", "width": 64, "height": 48} for n in range(count)],
        "annotations": [
            {"id": n, "image_id": 100 + n // 2, "category_id": (7, 3)[n % 2], "bbox": [4 + n % 5, 6, 20, 12]}
            for n in range(2 * count - 2)  # the last image has none
        ],
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
    }


def put(path, noted=None, count=20, start=0):
    (path / "images").mkdir(parents=True, exist_ok=True)
    for n in range(count):
        Image.fromarray(np.full((48, 64, 3), start + n, np.uint8)).save(path / "images" / f"{n}.png")
    text = noted if isinstance(noted, str) else json.dumps(content(count) if noted is None else noted)
    (path / "annotations.json").write_text(text)
    return path


def test_boxes_follow_the_size_of_their_image(tmp_path):
    found = data.load(f"coco:{put(tmp_path)}", input_size=SIZE)
    assert found.names == ("cat", "dog")
    assert (found.classes, found.fit) == (None, "stretch")
    seen = {}
    for part in data.PARTS:
        for (images,), target in found.batches(part, 4):
            shades = (images[:, 0, 0, 0] * found.std[0] + found.mean[0]) * 255
            for row, shade in enumerate(shades.round().int().tolist()):
                seen[shade] = target["boxes"][row], target["labels"][row]
    assert sorted(seen) == list(range(20))
    for n, (boxes, labels) in seen.items():
        assert boxes.dtype == torch.float32
        assert labels.tolist() == ([1, 0] if n < 19 else [])
        wanted = [[4 + m % 5, 6, 24 + m % 5, 18] for m in (2 * n, 2 * n + 1)] if n < 19 else np.zeros((0, 4))
        np.testing.assert_allclose(boxes, np.array(wanted) * [0.5, 32 / 48, 0.5, 32 / 48], rtol=1e-5)


def test_parts_are_kept_crowds_left_out_and_overhanging_boxes_cut(tmp_path):
    noted = content()
    noted["annotations"][0] |= {"iscrowd": 1}
    noted["annotations"][1] |= {"bbox": [-0.4, 0, 64.9, 48]}
    put(tmp_path / "train", noted)
    put(tmp_path / "test", count=5, start=100)
    found = data.load(f"coco:{tmp_path}", input_size=SIZE)
    assert found.notes == ("1 annotations of crowds were left out.",)
    boxes = [
        box for part in ("train", "calibration") for _, t in found.batches(part, 1) for box in t["boxes"][0].tolist()
    ]
    assert [0.0, 0.0, 32.0, 32.0] in boxes


def changed(kind, place, **values):
    noted = content()
    noted[kind][place] |= values
    return noted


WRONG = {
    "no json": ("{", "is no JSON"),
    "a list": ("[]", "no list of images"),
    "no categories": ({**content(), "categories": []}, "names no categories"),
    "no images": ({**content(), "images": []}, "lists no images"),
    "a missing image": (changed("images", 3, file_name="none.png"), "names none.png, which images/ does not hold"),
    "a way out": (changed("images", 3, file_name="../../annotations.json"), "image 103 has the file_name"),
    "an absolute path": (changed("images", 3, file_name="/etc/passwd"), "image 103 has the file_name"),
    "an unknown image": (
        changed("annotations", 3, image_id=7),
        "annotation 3 has the image_id 7, which the file does not",
    ),
    "an unknown class": (changed("annotations", 3, category_id=9), "annotation 3 has the category_id 9"),
    "an id of text": (changed("annotations", 3, image_id="7"), "annotation 3 has the image_id '7'"),
    "an empty box": (changed("annotations", 3, bbox=[1, 1, 0, 5]), "annotation 3 has the bbox [1, 1, 0, 5]"),
    "not a number": (json.dumps(changed("annotations", 3, bbox=[1, 1, float("nan"), 5])), "annotation 3 has the bbox"),
    "three numbers": (changed("annotations", 3, bbox=[1, 1, 5]), "annotation 3 has the bbox"),
    "outside": (changed("annotations", 3, bbox=[60, 1, 20, 5]), "images/1.png has 64×48 pixels"),
    "two ids": (changed("images", 3, id=100), "two images of the id 100"),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_bad_annotations_are_named(tmp_path, case):
    noted, says = case
    with pytest.raises(DataError) as caught:
        data.load(f"coco:{put(tmp_path, noted)}", input_size=SIZE)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.hint


def test_parts_with_other_categories_and_folders_that_are_none(tmp_path):
    with pytest.raises(DataError, match=r"has no annotations\.json"):
        data.load(f"coco:{tmp_path}")
    put(tmp_path / "train")
    put(tmp_path / "test", changed("categories", 0, name="wolf"), start=100)
    with pytest.raises(DataError, match="other categories"):
        data.load(f"coco:{tmp_path}", input_size=SIZE)
    put(tmp_path / "test", start=100)
    (tmp_path / "test" / "images" / "2.png").write_text("no picture")
    with pytest.raises(DataError, match=r"2\.png is not a readable image"):
        data.load(f"coco:{tmp_path}", input_size=SIZE)


def test_two_categories_of_one_id_and_numbers_beyond_all_pixels_are_refused(tmp_path):
    noted = content()
    noted["categories"][1]["id"] = 7
    with pytest.raises(DataError, match="two categories of one id"):
        data.load(f"coco:{put(tmp_path / 'a', noted)}", input_size=SIZE)
    noted = content()
    noted["annotations"][0]["bbox"] = [0, 0, 10**400, 5]
    with pytest.raises(DataError, match="annotation 0 has the bbox"):
        data.load(f"coco:{put(tmp_path / 'b', noted)}", input_size=SIZE)
