"""What becomes of an image of any size: as torchvision's reference training has it, to the bit."""

import numpy as np
import pytest
import torch

from wus_ext.training import ConfigError, DataError, TrainConfig, load_data
from wus_ext.training.seeding import generator
from wus_ext.training.transforms import centre, random_resized_crop, shorter_side

from .test_data import CPU
from .tiny import folder_config

Image = pytest.importorskip("PIL.Image")
reference = pytest.importorskip("torchvision.transforms")

SIZES = [(64, 64), (100, 64), (37, 211), (500, 333), (20, 20), (1, 90), (300, 41)]


def photo(width, height):
    noise = np.random.default_rng(0).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3))
    return Image.fromarray(noise.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("wanted", "side"), [(32, 32), (32, shorter_side(32)), (56, 64)])
def test_the_middle_is_torchvisions(size, wanted, side):
    image = photo(*size)
    expected = reference.CenterCrop(wanted)(reference.Resize(side)(image))
    assert centre(image, wanted, side) == expected
    assert expected.size == (wanted, wanted)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_random_parts_are_torchvisions(size):
    image, crop = photo(*size), reference.RandomResizedCrop(48)
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        mine = random_resized_crop(image, 48, torch.Generator().manual_seed(seed))
        assert mine == crop(image)
        seen.add(mine.tobytes())
    assert len(seen) > 1 or size in ((1, 90), (300, 41))  # these are cut in the middle


def raw(data, split):
    """Bytes, without normalisation."""
    return torch.cat([images for images, _ in split.batches(torch.arange(len(split)), 4)])


def test_photographs_keep_their_aspect(photos):
    data = load_data(folder_config(photos))
    assert (data.train.size, data.augment, data.size) == (32, "crop", 32)
    images = raw(data, data.test)
    assert images.shape == (6, 3, 32, 32)
    assert (images[:, 0, :, 14] > 200).all()
    assert (images[:, 0, :, 17] < 50).all()
    assert "32x32 from the middle of each, whose shorter side is made 32" in data.about
    assert "training images shifted by up to 4 pixels and mirrored" in data.about


def large(photos, **settings):
    return folder_config(photos, image_size=64, device="cpu", **settings)


def test_large_photographs_give_random_parts(photos):
    data = load_data(large(photos, workers=0))
    assert type(data.train).__name__ == "FileSplit"
    assert [type(part).__name__ for part in (data.test,)] == ["MemorySplit"]
    assert "training images random parts, resized and mirrored" in data.about
    assert f"whose shorter side is made {shorter_side(64)}" in data.about
    (images, _), *_ = data.training_batches(8, 0, 1, CPU)
    assert images.shape == (8, 3, 64, 64)
    # Of some only one half is seen.
    red = images[:, 0] > 0
    assert red.flatten(1).all(1).any() or (~red).flatten(1).all(1).any()


def batches(config, epoch=1):
    data = load_data(config)
    return torch.cat([images for images, _ in data.training_batches(4, 0, epoch, CPU)])


def test_random_parts_do_not_depend_on_workers(photos):
    whole = batches(large(photos, workers=0))
    assert torch.equal(batches(large(photos, workers=2)), whole)
    assert torch.equal(batches(large(photos, workers=0)), whole)
    assert not torch.equal(batches(large(photos, workers=0), epoch=2), whole)


def test_augmentation_can_be_chosen(photos):
    none = load_data(large(photos, augment="none", flip=False, normalize="half"))
    assert "training images as they are; normalised with half mean" in none.about
    seen = torch.cat([images for images, _ in none.training_batches(16, 0, 1, CPU)])
    whole = none.normalize(raw(none, none.train))
    assert torch.equal(seen.flatten(1).sum(1).sort().values, whole.flatten(1).sum(1).sort().values)
    assert whole.min() >= -1
    shifted = load_data(large(photos, augment="crop"))
    assert "shifted by up to 8 pixels" in shifted.about
    assert type(shifted.train).__name__ == "MemorySplit"


def test_images_of_a_data_set_are_resized_last():
    config = TrainConfig(limit_train=20, limit_test=10, device="cpu")
    small, large = load_data(config), load_data(config.replace(image_size=64))
    ((images, labels),) = small.training_batches(20, 0, 1, CPU)
    ((others, theirs),) = large.training_batches(20, 0, 1, CPU)
    assert torch.equal(labels, theirs)
    expected = torch.nn.functional.interpolate(images, (64, 64), mode="bilinear")
    torch.testing.assert_close(others, expected)
    assert "64x64, resized from 32x32" in large.about
    assert load_data(config.replace(image_size=16)).sample().shape == (2, 3, 16, 16)


@pytest.mark.parametrize(
    ("name", "mean"), [("imagenet", [0.485, 0.456, 0.406]), ("half", [0.5, 0.5, 0.5])]
)
def test_normalisation_by_name(name, mean):
    data = load_data(TrainConfig(limit_train=20, limit_test=10, device="cpu", normalize=name))
    grey = torch.full((1, 3, 4, 4), 255.0) * torch.tensor(mean).view(1, -1, 1, 1)
    torch.testing.assert_close(data.normalize(grey), torch.zeros(1, 3, 4, 4), atol=1e-6, rtol=0)


def test_without_test_there_is_val(photos):
    assert len(load_data(folder_config(photos)).test) == 6
    (photos / "val").rename(photos / "valid")
    with pytest.raises(DataError, match="has no test folder"):
        load_data(folder_config(photos))


def test_random_parts_need_files():
    with pytest.raises(ConfigError, match="augment='resized' needs the dataset 'folder'"):
        TrainConfig(augment="resized").validate()


def test_an_image_has_random_numbers_of_its_own():
    draws = {generator("cpu", 0, "crop", 1, index).initial_seed() for index in range(100)}
    assert len(draws) == 100
