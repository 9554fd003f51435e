"""A YOLO from its yaml in ultralytics' own trainer, for the dense model and for recovery: discs in an image.

leanort deploy examples/loop_yolo.py:model --data examples/loop_yolo.py:data --name loop-yolo \
    --set task.name=examples/loop_yolo.py:task --set task.output=output_0 --set task.keep_outputs=false \
    --set baseline.train=examples/loop_yolo.py:fit --set finetune.train=examples/loop_yolo.py:fit
"""

import os

import torch
from torch.utils.data import DataLoader
from torchvision.ops import box_convert, box_iou
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import DetectionModel

SAMPLES, EPOCHS = int(os.environ.get("SAMPLES", "1000")), int(os.environ.get("EPOCHS", "15"))


def model():
    return DetectionModel("yolov8n.yaml", nc=2, verbose=False)


def data():  # three discs, each red (0) or green (1) and in another quarter of the image
    draw, line = torch.Generator().manual_seed(0), torch.arange(64) + 0.5
    for _ in range(SAMPLES):
        spots, kinds = torch.rand(3, 3, generator=draw), torch.randint(2, (3,), generator=draw)
        x, y, r = 8 * spots + torch.tensor([[12, 44, 12], [12, 12, 44], [5, 5, 5]])
        discs = torch.hypot(line - x[:, None, None], line[:, None] - y[:, None, None]) < r[:, None, None]
        image, boxes = 0.6 * torch.rand(3, 64, 64, generator=draw), torch.stack([x - r, y - r, x + r, y + r], 1)
        yield image.index_add(0, kinds, 0.4 * discs), {"boxes": boxes, "labels": kinds}


def rows(samples):
    boxes, kinds = (torch.cat([target[name] for _, target in samples]) for name in ("boxes", "labels"))
    of, boxes = torch.arange(len(samples)).repeat_interleave(3), box_convert(boxes, "xyxy", "cxcywh") / 64
    return {"img": 255 * torch.stack([x for x, _ in samples]), "cls": kinds[:, None], "bboxes": boxes, "batch_idx": of}


class Trainer(DetectionTrainer):
    def get_dataset(self):
        return {"train": "train", "val": "calibration", "nc": 2, "names": ["red", "green"], "channels": 3}


def fit(model, data, report):
    off = dict.fromkeys(("val", "save", "plots", "amp", "close_mosaic"), False)
    trainer = Trainer(overrides=off | {"model": "yolov8n.yaml", "device": "cpu", "imgsz": 64, "epochs": EPOCHS})
    trainer.get_dataloader = lambda part, batch_size, **_: DataLoader(data.dataset(part), 16, True, collate_fn=rows)
    trainer.model, trainer.validate = model, lambda: ({}, 0.0)
    trainer.train()
    return trainer.ema.ema


def found(outputs, target):  # of each image: how well the best box of each object fits, times how sure it is
    boxes, sure = box_convert(outputs[:, :4].mT, "cxcywh", "xyxy"), outputs[:, 4:]
    each = zip(target["boxes"], target["labels"], boxes, sure, strict=True)
    return torch.stack([(box_iou(true, box) * share[kind]).amax(1).mean() for true, kind, box, share in each])


def task():
    return {"loss": lambda *both: 1 - found(*both).mean(), "scores": {"found": found}, "shares": ["found"]}
