import pytest
import torch

from wus_ext.distributed import processes
from wus_ext.training import DataError, TrainConfig, load_data
from wus_ext.training.augment import Normalize, crop_and_flip
from wus_ext.training.splits import MemorySplit, balanced_order

from . import tiny
from .tiny import folder_config

CPU = torch.device("cpu")


# Augmentation


def test_each_crop_is_a_shifted_and_perhaps_mirrored_view_of_its_image():
    images = torch.arange(6 * 3 * 8 * 8).view(6, 3, 8, 8).float() + 1
    out = crop_and_flip(images, torch.Generator().manual_seed(3), padding=2)
    padded = torch.nn.functional.pad(images, (2,) * 4)
    seen = set()
    for image, crop in zip(padded, out, strict=True):
        matches = [
            (top, left, mirrored)
            for top in range(5)
            for left in range(5)
            for mirrored in (False, True)
            if torch.equal(crop, view(image, top, left, mirrored))
        ]
        assert len(matches) == 1
        seen.update(matches)
    assert len(seen) > 1


def view(image, top, left, mirrored):
    crop = image[:, top : top + 8, left : left + 8]
    return crop.flip(2) if mirrored else crop


def test_nothing_is_mirrored_without_flip():
    images = torch.randint(0, 255, (64, 3, 8, 8), dtype=torch.uint8)
    out = crop_and_flip(images, torch.Generator(), padding=0, flip=False)
    assert torch.equal(out, images)
    mirrored = crop_and_flip(images, torch.Generator(), padding=0)
    flipped = (mirrored != images).flatten(1).any(1)
    assert 0 < flipped.sum() < 64
    assert torch.equal(mirrored[flipped], images[flipped].flip(3))


def test_crop_keeps_uint8_and_gives_channels_last():
    out = crop_and_flip(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.Generator())
    assert out.dtype == torch.uint8
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_normalized_training_images_have_mean_0_and_deviation_1():
    split = tiny.split(40)
    mean, std = split.statistics()
    reference = split.images.double() / 255
    torch.testing.assert_close(mean, reference.mean((0, 2, 3)).float())
    torch.testing.assert_close(std, reference.std((0, 2, 3), correction=0).float())
    out = Normalize(mean, std)(split.images).double()
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(3).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.std((0, 2, 3), correction=0), torch.ones(3).double())


def test_a_constant_channel_does_not_become_nan():
    images = torch.full((4, 3, 8, 8), 7, dtype=torch.uint8)
    split = MemorySplit(images, torch.zeros(4, dtype=torch.long))
    assert Normalize(*split.statistics())(images).abs().max() < 1e-5


# Epochs


def batches(data, epoch, seed=0):
    return list(data.training_batches(8, seed, epoch, CPU))


def test_an_epoch_is_reproducible_and_differs_from_others():
    data = tiny.data()
    first, again, other, seed = (
        torch.cat([images for images, _ in part])
        for part in (batches(data, 1), batches(data, 1), batches(data, 2), batches(data, 1, 1))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, seed)


@pytest.mark.parametrize(("count", "sizes"), [(36, [8] * 4), (8, [8]), (6, [6])])
def test_training_batches_are_full(count, sizes):
    data = tiny.data(train=count)
    assert [len(labels) for _, labels in batches(data, 1)] == sizes
    assert data.steps(8) == len(sizes)


def test_evaluation_sees_every_image_once_and_unchanged():
    data = tiny.data(test=10)
    out = list(data.evaluation_batches(data.test, 4))
    assert [len(labels) for _, labels in out] == [4, 4, 2]
    assert torch.equal(torch.cat([images for images, _ in out]), data.normalize(data.test.images))


@pytest.fixture
def as_process(monkeypatch):
    def be(rank, count):
        monkeypatch.setattr(processes, "rank", lambda: rank)
        monkeypatch.setattr(processes, "count", lambda group=None: count)

    return be


@pytest.mark.parametrize("files", [False, True], ids=["in_memory", "from_files"])
def test_processes_share_the_batches_of_one(as_process, tree, files):
    memory = {"memory_budget": 0.0, "workers": 0} if files else {}
    data = load_data(folder_config(tree, **memory))
    whole = list(data.training_batches(6, 0, 1, CPU))
    tested = list(data.evaluation_batches(data.test, 6))
    assert len(whole) == data.steps(6) == 2
    parts, test_parts = [], []
    for rank in range(3):
        as_process(rank, 3)
        assert data.steps(2) == 2
        parts.append(list(data.training_batches(2, 0, 1, CPU)))
        test_parts += data.evaluation_batches(data.test, 6)
    for together, *each in zip(whole, *parts, strict=True):
        for tensor, *pieces in zip(together, *each, strict=True):
            assert torch.equal(tensor, torch.cat(pieces))
    for tensor, pieces in zip(tested[0], zip(*test_parts, strict=True), strict=True):
        assert torch.equal(tensor, torch.cat(pieces))


def test_a_set_smaller_than_the_batches_is_shared_too(as_process):
    data = tiny.data(train=7)
    as_process(1, 3)
    ((images, _),) = data.training_batches(8, 0, 1, CPU)
    assert len(images) == 2
    as_process(0, 8)
    with pytest.raises(DataError, match="7 training images are too few for 8 processes"):
        data.steps(8)


# Subsets


def test_any_prefix_of_a_balanced_order_is_balanced():
    labels = torch.tensor([0] * 50 + [1] * 20 + [2] * 10)[torch.randperm(80)]
    order = balanced_order(labels, torch.Generator())
    assert sorted(order.tolist()) == list(range(80))
    assert torch.bincount(labels[order[:30]]).tolist() == [10, 10, 10]
    assert torch.bincount(labels[order[:50]]).tolist() == [20, 20, 10]


def test_limits_and_validation_are_balanced_and_disjoint():
    config = TrainConfig(limit_train=200, limit_test=50, validation=0.25)
    data = load_data(config)
    for split, each in ((data.train, 15), (data.validation, 5), (data.test, 5)):
        assert torch.bincount(split.labels).tolist() == [each] * 10
    rows = torch.cat([data.train.images, data.validation.images]).flatten(1)
    whole = load_data(config.replace(validation=0.0)).train.images.flatten(1)
    assert torch.equal(rows.sum(1).sort().values, whole.sum(1).sort().values)
    assert torch.equal(data.train.images, load_data(config.replace(seed=7)).train.images)


def test_digits():
    data = load_data(TrainConfig())
    assert (len(data.train), len(data.test), data.classes) == (1442, 355, list("0123456789"))
    assert data.train.images.shape == (1442, 3, 32, 32)
    assert data.train.images.dtype == torch.uint8
    assert int(data.train.images.max()) > 200
    assert not data.flip


@pytest.mark.parametrize("name", ["limit_train", "limit_test"])
def test_a_limit_below_the_class_count_is_refused(name):
    with pytest.raises(DataError, match=f"{name} must be at least the number of classes, 10"):
        load_data(TrainConfig(**{name: 9}))
