"""A network and images small enough for training in a test."""

import torch
from torch import nn

from wus_ext.training import Data, MemorySplit, TrainConfig, Trainer
from wus_ext.training.augment import Normalize
from wus_ext.training.seeding import generator

CONFIG = TrainConfig(epochs=4, batch_size=8, lr=0.05, warmup=1, patience=1, threshold=100.0)


def build(classes):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(4 * 8 * 8, classes),
    )


def split(count, *key):
    random = generator("cpu", 0, "images", *key)
    labels = torch.arange(count) % 2
    images = torch.randint(0, 200, (count, 3, 32, 32), generator=random)
    # Class 1 is brighter: learnable at once.
    return MemorySplit((images + 55 * labels.view(-1, 1, 1, 1)).byte(), labels)


def data(train=36, test=10, validation=None, device="cpu"):
    train_split = split(train, "train")
    return Data(
        train=train_split.to(device),
        validation=split(validation, "validation").to(device) if validation else None,
        test=split(test, "test").to(device),
        classes=["dark", "bright"],
        normalize=Normalize(*train_split.statistics()).to(device),
    )


def trainer(out=None, resume=False, build=build, **settings):
    images = settings.pop("data", None) or data()
    config = CONFIG.replace(**settings)
    return Trainer(config, out=out, resume=resume, data=images, build=build)


def weights(run):
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


def folder_config(tree, **settings):
    return TrainConfig(dataset="folder", data_dir=str(tree), **settings)
