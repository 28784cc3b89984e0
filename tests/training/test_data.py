import io
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from wus_ext.distributed import processes
from wus_ext.training import DataError, TrainConfig, load_data
from wus_ext.training.augment import Normalize, crop_and_flip
from wus_ext.training.cifar import load_cifar
from wus_ext.training.folder import decode_image, scan_folder
from wus_ext.training.splits import MemorySplit, balanced_order

from . import tiny

Image = pytest.importorskip("PIL.Image")
CPU = torch.device("cpu")


@pytest.fixture
def tree(tmp_path):
    """6 training and 2 test images of each of two classes; one class is of another size."""
    for part, count in (("train", 6), ("test", 2)):
        for brightness, name, size in ((40, "cat", (32, 32)), (200, "dog", (48, 20))):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", size, (brightness, index, 0)).save(folder / f"{index}.png")
    return tmp_path


def folder_config(tree, **settings):
    return TrainConfig(dataset="folder", data_dir=str(tree), **settings)


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


# Folders


def test_folder_in_memory_and_from_files_give_the_same_batches(tree):
    memory = load_data(folder_config(tree))
    files = load_data(folder_config(tree, memory_budget=0.0, workers=0))
    assert type(memory.train).__name__ == "MemorySplit"
    assert type(files.train).__name__ == "FileSplit"
    assert memory.classes == files.classes == ["cat", "dog"]
    assert memory.flip
    for (images, labels), (other, other_labels) in zip(
        batches(memory, 1), batches(files, 1), strict=True
    ):
        assert torch.equal(images, other)
        assert torch.equal(labels, other_labels)


def test_folder_with_worker_processes(tree):
    data = load_data(folder_config(tree, memory_budget=0.0, workers=1))
    images, labels = next(iter(data.evaluation_batches(data.test, 8)))
    assert images.shape == (4, 3, 32, 32)
    assert labels.tolist() == [0, 0, 1, 1]


def test_an_image_of_another_size_or_mode_becomes_32x32_rgb(tmp_path):
    Image.new("L", (60, 45), 100).save(tmp_path / "grey.png")
    image = decode_image(tmp_path / "grey.png")
    assert image.shape == (3, 32, 32)
    assert image.unique().tolist() == [100]


def remove(path):
    for entry in path.rglob("*"):
        if entry.is_file():
            entry.unlink()
    for entry in sorted(path.rglob("*"), reverse=True):
        entry.rmdir()
    path.rmdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tree: remove(tree), "no such folder"),
        (lambda tree: remove(tree / "test"), "has no test folder"),
        (lambda tree: remove(tree / "train"), "has no train folder"),
        (lambda tree: [remove(tree / "train" / c) for c in ("cat", "dog")], "no class folders"),
        (lambda tree: [f.unlink() for f in (tree / "train/dog").iterdir()], "train/dog has no ima"),
        (lambda tree: (tree / "test/dog").rename(tree / "test/cow"), "cow, dog are in only one"),
        (lambda tree: [remove(tree / p / "dog") for p in ("train", "test")], "only the class cat"),
        (lambda tree: (tree / "train/cat/0.png").write_text("no"), r"cannot read .*cat/0\.png"),
    ],
    ids=["root", "test", "train", "classes", "empty", "mismatch", "one", "unreadable"],
)
def test_a_bad_folder_gives_one_clear_error(tree, damage, message):
    damage(tree)
    with pytest.raises(DataError, match=message):
        load_data(folder_config(tree))


def test_hidden_files_are_ignored(tree):
    (tree / "train/.cache").mkdir()
    (tree / "train/cat/.DS_Store").write_text("")
    train, _, classes = scan_folder(tree)
    assert (len(train), classes) == (12, ["cat", "dog"])


# CIFAR


class Python2Pickler(pickle._Pickler):
    """Writes text and bytes as Python 2 did, whose pickles the original archives hold."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_string(self, value):
        value = value.encode("latin1") if isinstance(value, str) else value
        self.write(b"T" + struct.pack("<i", len(value)) + value)

    dispatch[str] = dispatch[bytes] = save_string


def python2_pickle(content):
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(content)
    return file.getvalue().replace(b"numpy._core", b"numpy.core")


def write_cifar(root: Path, name: str):
    """A few images in the files, keys and pickle protocol of the original archives."""
    ten = name == "cifar10"
    folder = root / ("cifar-10-batches-py" if ten else "cifar-100-python")
    folder.mkdir()
    random = np.random.default_rng(0)
    classes = 10 if ten else 100
    parts = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"] if ten else ["train", "test"]
    written = {}
    for part in parts:
        pixels = random.integers(0, 256, (classes, 3072), dtype=np.uint8)
        labels = random.permutation(classes).tolist()
        content = {"data": pixels, "labels" if ten else "fine_labels": labels, "filenames": ["x"]}
        (folder / part).write_bytes(python2_pickle(content))
        written[part] = pixels, labels
    names = [f"class {i}" for i in range(classes)]
    meta = {"label_names": names} if ten else {"fine_label_names": names}
    (folder / ("batches.meta" if ten else "meta")).write_bytes(python2_pickle(meta))
    return folder, written


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
@pytest.mark.parametrize("inside", [False, True], ids=["parent", "folder"])
def test_cifar_is_read_from_an_existing_copy(tmp_path, name, classes, inside):
    folder, written = write_cifar(tmp_path, name)
    root = folder if inside else tmp_path
    train, test, names = load_cifar(name, root, download=False)
    assert len(names) == len(test) == classes
    assert len(train) == (len(written) - 1) * classes
    pixels, labels = next(iter(written.values()))
    assert torch.equal(train.images[:classes], torch.from_numpy(pixels).view(-1, 3, 32, 32))
    assert train.labels[:classes].tolist() == labels


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "test_batch is missing"),
        (b"\x80\x02}q", "test_batch is damaged"),
        (pickle.dumps([1]), "holds a list"),
        (pickle.dumps({"data": 1, "labels": [1]}), "not a CIFAR batch"),
        (pickle.dumps({"data": np.zeros((1, 3), np.uint8), "labels": [1]}), "not a CIFAR batch"),
        (pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [10]}), "not a CIFAR"),
        (pickle.dumps(Evil()), "test_batch is damaged .*unexpected"),
    ],
    ids=["missing", "truncated", "list", "keys", "shape", "label", "code"],
)
def test_a_damaged_cifar_file_is_named(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    folder, _ = write_cifar(tmp_path, "cifar10")
    (folder / "test_batch").unlink()
    if content is not None:
        (folder / "test_batch").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_cifar("cifar10", tmp_path)
    assert not Path("executed").exists()


def test_no_copy_and_no_download_names_the_alternatives(tmp_path):
    with pytest.raises(DataError, match=r"(?s)no copy of cifar100.*folder.*digits"):
        load_cifar("cifar100", tmp_path, download=False)


def test_no_network_names_the_alternatives(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")

    def unreachable(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(datasets.utils, "_urlretrieve", unreachable)
    with pytest.raises(DataError, match=r"(?s)cannot download cifar10.*folder.*digits"):
        load_cifar("cifar10", tmp_path)
