"""Loops as users write them: good ones, and each way of going wrong."""

import copy
import pickle

import torch
import torch.nn.functional as F


def plain(model, data, report):
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=0.01)
    for _ in range(2):
        batches = data.loader("train", 64)
        for step, (images, labels) in enumerate(batches):
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            report(step + 1, len(batches), f"loss {loss:.2f}")


def averaged(model, data, report):
    """Trains a copy that went through a pickle, and hands back the average of its weights."""
    model = pickle.loads(pickle.dumps(model))
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.AdamW(model.parameters(), 0.002, weight_decay=0.1)
    for images, labels in data.loader("train", 64):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        average.update_parameters(model)
    return copy.deepcopy(average).module


def by_samples(model, data, report):
    """Batches by torch's own loader, taught by the dense model, wrapped as torch wraps a model."""
    wrapped = torch.nn.Module()
    wrapped.module = model
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for images, _ in torch.utils.data.DataLoader(data.dataset("train"), batch_size=48, shuffle=True):
        optimizer.zero_grad()
        loss = (
            model(images).square().mean() if data.teacher is None else F.mse_loss(model(images), data.teacher(images))
        )
        loss.backward()
        optimizer.step()
    return wrapped


def swaps(model, data, report):
    return torch.nn.Linear(3, 3)


def freezes(model, data, report):
    model.requires_grad_(False)


def forgets_to_go_back(model, data, report):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for images, labels in data.loader("train", 64):
        F.cross_entropy(model(images), labels)
        optimizer.step()


def explodes(model, data, report):
    with torch.no_grad():
        next(model.parameters()).mul_(float("nan"))


def forgets_the_masks(model, data, report):
    new = type(model)()
    new.load_state_dict(model.state_dict())
    plain(new, data, report)
    return new


def leaves(model, data, report):
    raise SystemExit(0)


def returns_a_number(model, data, report):
    return 3


def looks_at_the_test_part(model, data, report):
    data.loader("test")
