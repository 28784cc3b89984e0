import pytest
import torch

from .tiny import trainer


@pytest.fixture(autouse=True)
def _one_thread():
    """Networks this small train faster on one thread, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tree(tmp_path):
    """6 training and 2 test images of each of two classes; one class is of another size."""
    image = pytest.importorskip("PIL.Image")
    for part, count in (("train", 6), ("test", 2)):
        for brightness, name, size in ((40, "cat", (32, 32)), (200, "dog", (48, 20))):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                image.new("RGB", size, (brightness, index, 0)).save(folder / f"{index}.png")
    return tmp_path


@pytest.fixture
def photos(tmp_path):
    """Photographs of two classes, all of different sizes; the left half of each is red."""
    module = pytest.importorskip("PIL.Image")
    for part, count in (("train", 8), ("val", 3)):
        for brightness, name in ((40, "cat"), (200, "dog")):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(count):
                image = module.new("RGB", (120 + 8 * index, 90), (0, brightness, 0))
                image.paste((250, 0, 0), (0, 0, image.width // 2, 90))
                image.save(tmp_path / part / name / f"{index}.png")
    return tmp_path


@pytest.fixture
def run(tmp_path):
    """The folder of a run that stopped after three epochs of four."""
    stopped = trainer(out=tmp_path)
    for _ in range(3):
        stopped.run_epoch()
    del stopped
    return tmp_path
