"""The Trainer of transformers as the loop, for the dense model and for recovery: a small vision transformer.

leanort deploy examples/loop_trainer.py:model --data examples/loop_trainer.py:data --name loop-trainer --ratio 0.7 \
    --set baseline.train=examples/loop_trainer.py:fit --set finetune.train=examples/loop_trainer.py:fit
"""

import os
import tempfile

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTConfig, ViTForImageClassification

SAMPLES, EPOCHS = int(os.environ.get("SAMPLES", "1797")), int(os.environ.get("EPOCHS", "20"))


def model():
    sizes = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 384}
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, num_channels=1, num_labels=10, **sizes))


def data():
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images[:SAMPLES]).float().view(-1, 1, 8, 8) / 16
    images, labels = F.interpolate(images, scale_factor=2, mode="bilinear"), torch.tensor(labels[:SAMPLES])
    cut = len(labels) * 4 // 5
    return TensorDataset(images[:cut], labels[:cut]), TensorDataset(images[cut:], labels[cut:])


class Told(TrainerCallback):
    def __init__(self, report):
        self.report = report

    def on_step_end(self, args, state, control, **_):
        self.report(state.global_step, state.max_steps)


def rows(samples):
    images, labels = zip(*samples, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.stack(labels)}


def fit(model, data, report):
    with tempfile.TemporaryDirectory() as folder:
        how = TrainingArguments(
            folder, num_train_epochs=EPOCHS, per_device_train_batch_size=32, learning_rate=1e-3, warmup_steps=20,
            weight_decay=0.05, lr_scheduler_type="cosine", use_cpu=True, report_to="none", save_strategy="epoch",
            save_total_limit=1, disable_tqdm=True, logging_strategy="no", remove_unused_columns=False,
        )  # fmt: skip
        train = data.dataset("train")
        Trainer(model, how, rows, train_dataset=train, callbacks=[Told(report)]).train()
