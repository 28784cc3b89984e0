"""CIFAR as it was published: read from a copy or an archive, and nothing else taken for it."""

import io
import os
import pickle
import shutil
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from wus_ext.training import DataError
from wus_ext.training.archive import md5
from wus_ext.training.cifar import _LAYOUTS, load_cifar

from .rights import without_override


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


@pytest.fixture
def publish(monkeypatch):
    """Makes the files of a small copy the published ones."""

    def publish(folder, *more):
        for layout in _LAYOUTS.values():
            if layout.folder == folder.name:
                for path in (*folder.iterdir(), *more):
                    monkeypatch.setitem(layout.checksums, path.name, md5(path))

    return publish


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
@pytest.mark.parametrize("inside", [False, True], ids=["parent", "folder"])
def test_cifar_is_read_from_an_existing_copy(tmp_path, publish, name, classes, inside):
    folder, written = write_cifar(tmp_path, name)
    publish(folder)
    root = folder if inside else tmp_path
    train, test, names = load_cifar(name, root, download=False)
    assert len(names) == len(test) == classes
    assert len(train) == (len(written) - 1) * classes
    pixels, labels = next(iter(written.values()))
    assert torch.equal(train.images[:classes], torch.from_numpy(pixels).view(-1, 3, 32, 32))
    assert train.labels[:classes].tolist() == labels


def test_the_checksums_are_those_that_torchvision_knows():
    datasets = pytest.importorskip("torchvision.datasets")
    for name, known in (("cifar10", datasets.CIFAR10), ("cifar100", datasets.CIFAR100)):
        expected = {known.filename: known.tgz_md5, known.meta["filename"]: known.meta["md5"]}
        expected |= dict([*known.train_list, *known.test_list])
        assert _LAYOUTS[name].checksums == expected


# Damage


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


PIXELS = np.zeros((1, 3072), np.uint8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "test_batch is missing"),
        (b"\x80\x02}q", "test_batch is damaged"),
        (b"", "test_batch is damaged"),
        (pickle.dumps([1]), "holds a list"),
        (pickle.dumps({}), "not a CIFAR batch, data must be an array"),
        (pickle.dumps({"data": 1, "labels": [1]}), "not a CIFAR batch, data must be an array"),
        (pickle.dumps({"data": PIXELS[:, :3], "labels": [1]}), "not a CIFAR batch, data must be"),
        (pickle.dumps({"data": PIXELS / 2, "labels": [1]}), "not a CIFAR batch, data must be an"),
        (pickle.dumps({"data": PIXELS[:0], "labels": []}), "as many labels as images, and some"),
        (pickle.dumps({"data": PIXELS}), "as many labels as images"),
        (pickle.dumps({"data": PIXELS, "labels": [1, 2]}), "as many labels as images"),
        (pickle.dumps({"data": PIXELS, "labels": 1}), "as many labels as images"),
        (pickle.dumps({"data": PIXELS, "labels": [10]}), "integers from 0 to 9, got 10"),
        (pickle.dumps({"data": PIXELS, "labels": [-1]}), "integers from 0 to 9, got -1"),
        (pickle.dumps({"data": PIXELS, "labels": [0.5]}), r"integers from 0 to 9, got 0\.5"),
        (pickle.dumps({"data": PIXELS, "labels": np.array([0.5])}), r"0 to 9, got 0\.5"),
        (pickle.dumps({"data": PIXELS, "labels": [True]}), "integers from 0 to 9, got True"),
        (pickle.dumps({"data": PIXELS, "labels": ["1"]}), "integers from 0 to 9, got '1'"),
        (pickle.dumps({"data": PIXELS, "labels": [[1]]}), r"integers from 0 to 9, got \[1\]"),
        (pickle.dumps(Evil()), "test_batch is damaged .*unexpected"),
    ],
    ids=["missing", "truncated", "empty", "list", "keys", "data", "shape", "dtype", "no-image",
         "no-labels", "count", "label", "10", "minus", "half", "half-array", "bool", "text",
         "nested", "code"],
)  # fmt: skip
def test_a_damaged_cifar_file_is_named(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    folder, _ = write_cifar(tmp_path, "cifar10")
    (folder / "test_batch").unlink()
    if content is not None:
        (folder / "test_batch").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_cifar("cifar10", tmp_path)
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    "names", [None, ["a"] * 9, ["a"] * 9 + [3], "abcdefghij", {"0": "a"}],
    ids=["missing", "nine", "number", "text", "dict"],
)  # fmt: skip
def test_class_names_that_are_missing_or_wrong_are_refused(tmp_path, names):
    folder, _ = write_cifar(tmp_path, "cifar10")
    meta = {"num_cases_per_batch": 10000} | ({} if names is None else {"label_names": names})
    (folder / "batches.meta").write_bytes(pickle.dumps(meta))
    with pytest.raises(DataError, match=r"batches\.meta does not have 10 label_names: delete "):
        load_cifar("cifar10", tmp_path)


def test_a_pipe_in_a_copy_does_not_block(tmp_path):
    folder, _ = write_cifar(tmp_path, "cifar100")
    (folder / "train").unlink()
    os.mkfifo(folder / "train")
    with pytest.raises(DataError, match="train is missing"):
        load_cifar("cifar100", tmp_path)


@pytest.mark.parametrize("damaged", [["data_batch_3"], ["data_batch_1", "test_batch"]])
def test_a_flipped_pixel_is_found(tmp_path, publish, damaged):
    """The file is well-formed: only its checksum tells."""
    folder, written = write_cifar(tmp_path, "cifar10")
    publish(folder)
    for name in damaged:
        content = bytearray((folder / name).read_bytes())
        place = content.index(written[name][0].tobytes()[:64])
        content[place + 10] ^= 1
        (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"not as published, .*: {', '.join(damaged)}; delete it"):
        load_cifar("cifar10", tmp_path)


def test_names_of_classes_have_a_checksum_too(tmp_path, publish):
    folder, _ = write_cifar(tmp_path, "cifar100")
    publish(folder)
    names = [f"other {i}" for i in range(100)]
    (folder / "meta").write_bytes(python2_pickle({"fine_label_names": names}))
    with pytest.raises(DataError, match=r"not as published, by the checksum, in .*: meta; delete"):
        load_cifar("cifar100", tmp_path)


# Archives


ARCHIVE = "cifar-10-python.tar.gz"


@pytest.fixture
def archive(tmp_path, publish):
    """The published archive of a small CIFAR-10, and nothing else, in ``data``."""
    folder, _ = write_cifar(tmp_path, "cifar10")
    (folder / "readme.html").write_text("read me")
    path = tmp_path / "data" / ARCHIVE
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, folder.name)
    publish(folder, path)
    return path


def test_an_archive_is_enough(archive):
    train, test, _ = load_cifar("cifar10", archive.parent, download=False)
    assert (len(train), len(test)) == (50, 10)
    folder = archive.parent / "cifar-10-batches-py"
    assert sorted(path.name for path in archive.parent.iterdir()) == [folder.name, ARCHIVE]
    wanted = ["batches.meta", *(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    assert sorted(path.name for path in folder.iterdir()) == wanted


def bad_member(name, *, kind=tarfile.REGTYPE, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    content = b"" if kind != tarfile.REGTYPE else b"evil"
    info.size = len(content)
    return info, io.BytesIO(content)


FOLDER = "cifar-10-batches-py"
BAD = {
    "parent": lambda: bad_member("../evil"),
    "parent-inside": lambda: bad_member(f"{FOLDER}/../../evil"),
    "absolute": lambda: bad_member("/tmp/evil-of-wus-ext"),
    "beside": lambda: bad_member("evil"),
    "other-folder": lambda: bad_member("other/evil"),
    "link": lambda: bad_member(f"{FOLDER}/link", kind=tarfile.SYMTYPE, target="/etc/passwd"),
    "link-for-file": lambda: bad_member(
        f"{FOLDER}/data_batch_1", kind=tarfile.SYMTYPE, target="/etc/passwd"
    ),
    "hard-link": lambda: bad_member(
        f"{FOLDER}/data_batch_1", kind=tarfile.LNKTYPE, target="/etc/passwd"
    ),
    "folder-link": lambda: bad_member(FOLDER, kind=tarfile.SYMTYPE, target="/tmp"),
    "device": lambda: bad_member(f"{FOLDER}/null", kind=tarfile.CHRTYPE),
    "pipe": lambda: bad_member(f"{FOLDER}/data_batch_1", kind=tarfile.FIFOTYPE),
}


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize("name", BAD)
def test_what_does_not_belong_into_an_archive_is_never_extracted(archive, monkeypatch, name, first):
    """Whatever its checksum says."""
    with tarfile.open(archive) as tar:
        good = [(m, io.BytesIO(tar.extractfile(m).read()) if m.isreg() else None) for m in tar]
    members = [BAD[name](), *good] if first else [*good, BAD[name]()]
    with tarfile.open(archive, "w:gz") as tar:
        for info, content in members:
            tar.addfile(info, content)
    monkeypatch.setitem(_LAYOUTS["cifar10"].checksums, ARCHIVE, md5(archive))
    with pytest.raises(DataError, match="is not what it should be and was not extracted: it holds"):
        load_cifar("cifar10", archive.parent, download=False)
    assert [path.name for path in archive.parent.iterdir()] == [ARCHIVE]
    assert not list(archive.parents[1].rglob("*evil*"))
    assert not Path("/tmp/evil-of-wus-ext").exists()


@pytest.mark.parametrize("left", [0, 10, 100, 10_000, -2_000])
def test_an_archive_that_is_cut_off_is_named(archive, monkeypatch, left):
    archive.write_bytes(archive.read_bytes()[:left])
    with pytest.raises(DataError, match=rf"{ARCHIVE} is damaged or cut off, its checksum is wrong"):
        load_cifar("cifar10", archive.parent, download=False)
    monkeypatch.setitem(_LAYOUTS["cifar10"].checksums, ARCHIVE, md5(archive))
    with pytest.raises(DataError, match=rf"{ARCHIVE} is (damaged or cut off|not what it should)"):
        load_cifar("cifar10", archive.parent, download=False)
    assert [path.name for path in archive.parent.iterdir()] == [ARCHIVE]


def test_an_archive_without_a_file_is_named(archive, monkeypatch):
    with tarfile.open(archive) as tar:
        good = [(m, io.BytesIO(tar.extractfile(m).read()) if m.isreg() else None) for m in tar]
    with tarfile.open(archive, "w:gz") as tar:
        for info, content in good:
            if not info.name.endswith("data_batch_2"):
                tar.addfile(info, content)
    monkeypatch.setitem(_LAYOUTS["cifar10"].checksums, ARCHIVE, md5(archive))
    with pytest.raises(DataError, match="is not what it should be: it lacks data_batch_2"):
        load_cifar("cifar10", archive.parent, download=False)


def test_an_archive_whose_files_are_others_is_found(archive, monkeypatch):
    monkeypatch.setitem(_LAYOUTS["cifar10"].checksums, "test_batch", "0" * 32)
    with pytest.raises(DataError, match=r"not as published, by the checksum, in .*: test_batch"):
        load_cifar("cifar10", archive.parent)


# Downloads


@pytest.fixture
def network(monkeypatch, archive):
    """A network that serves the published archive; gives what was fetched."""
    utils = pytest.importorskip("torchvision.datasets.utils")
    content, fetched = archive.read_bytes(), []

    def retrieve(url, filename, **options):
        fetched.append(url)
        Path(filename).write_bytes(network.content)

    def network():
        return fetched

    network.content = content
    monkeypatch.setattr(utils, "_urlretrieve", retrieve)
    monkeypatch.setattr(utils, "_get_redirect_url", lambda url, max_hops: url)
    return network


@pytest.mark.parametrize("before", ["nothing", "damaged"])
def test_an_archive_is_downloaded_where_there_is_none_that_is_whole(archive, network, before):
    if before == "nothing":
        archive.unlink()
    else:
        archive.write_bytes(b"half")
    assert len(load_cifar("cifar10", archive.parent)[0]) == 50
    assert network() == [f"https://www.cs.toronto.edu/~kriz/{ARCHIVE}"]
    assert archive.read_bytes() == network.content
    load_cifar("cifar10", archive.parent)
    assert len(network()) == 1
    assert len(list(archive.parent.iterdir())) == 2


def test_a_download_that_is_damaged_is_not_kept(archive, network):
    archive.unlink()
    network.content = network.content[:-1]
    with pytest.raises(DataError, match=r"(?s)cannot download cifar10 \(.*folder.*digits"):
        load_cifar("cifar10", archive.parent)
    assert list(archive.parent.iterdir()) == []


def test_no_copy_and_no_download_names_the_alternatives(tmp_path):
    with pytest.raises(DataError, match=r"(?s)no copy of cifar100.*folder.*digits"):
        load_cifar("cifar100", tmp_path, download=False)


@pytest.mark.parametrize("damaged", [False, True])
def test_no_network_names_the_alternatives(tmp_path, monkeypatch, damaged):
    datasets = pytest.importorskip("torchvision.datasets")
    if damaged:
        (tmp_path / ARCHIVE).write_bytes(b"half")

    def unreachable(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(datasets.utils, "_urlretrieve", unreachable)
    with pytest.raises(DataError, match=r"(?s)cannot download cifar10.*folder.*digits") as caught:
        load_cifar("cifar10", tmp_path)
    assert (f"{ARCHIVE} is damaged or cut off, its checksum is wrong; " in str(caught.value)) == (
        damaged
    )


def test_a_folder_that_cannot_be_written_to_is_named(archive):
    archive.parent.chmod(0o555)
    try:
        with (
            without_override(),
            pytest.raises(DataError, match=rf"cannot extract .*{ARCHIVE}: Permission denied"),
        ):
            load_cifar("cifar10", archive.parent)
    finally:
        archive.parent.chmod(0o755)


def test_two_processes_may_extract_at_once(archive, monkeypatch):
    """The other one's folder appears while this one extracts."""
    rename = os.rename

    def late(source, target):
        shutil.copytree(source, target)
        rename(source, target)

    monkeypatch.setattr("os.rename", late)
    assert len(load_cifar("cifar10", archive.parent)[0]) == 50
    assert len(list(archive.parent.iterdir())) == 2
