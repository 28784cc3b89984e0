"""Any image file as RGB: as torchvision reads it, and never clipped."""

import functools
import io
import struct
import zlib

import numpy as np
import pytest
import torch

from wus_ext.training import DataError, images
from wus_ext.training.transforms import centre

Image = pytest.importorskip("PIL.Image")
decode_image = functools.partial(
    images.decode_image, shape=functools.partial(centre, size=32, side=32)
)


def test_an_image_of_another_size_or_mode_becomes_32x32_rgb(tmp_path):
    Image.new("L", (60, 45), 100).save(tmp_path / "grey.png")
    image = decode_image(tmp_path / "grey.png")
    assert image.shape == (3, 32, 32)
    assert image.unique().tolist() == [100]


# As torchvision


def pixels(*shape, low=0):
    return np.random.default_rng(0).integers(low, 256, shape, dtype=np.uint8)


def oriented():
    """Lies on its side, as a camera that was turned writes it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return Image.fromarray(pixels(32, 32, 3)), {"exif": exif}


def palette_with_transparency():
    image = Image.fromarray(pixels(32, 32, 3)).quantize(16)
    return image, {"transparency": 3}


def frames():
    first, second = (Image.new("RGB", (32, 32), colour) for colour in ("red", "blue"))
    return first, {"save_all": True, "append_images": [second]}


CASES = {
    "rgb.png": lambda: (Image.fromarray(pixels(32, 32, 3)), {}),
    "rgb.jpg": lambda: (Image.fromarray(pixels(32, 32, 3)), {}),
    "transparent.png": lambda: (Image.fromarray(pixels(32, 32, 4), "RGBA"), {}),
    "transparent.webp": lambda: (Image.fromarray(pixels(32, 32, 4), "RGBA"), {"lossless": True}),
    "grey-transparent.png": lambda: (Image.fromarray(pixels(32, 32, 2), "LA"), {}),
    "palette.png": palette_with_transparency,
    "print.jpg": lambda: (Image.fromarray(pixels(32, 32, 4), "CMYK"), {}),
    "black-white.png": lambda: (Image.fromarray(pixels(32, 32) > 127), {}),
    "oriented.jpg": oriented,
    "oriented.png": oriented,
    "frames.gif": frames,
    "frames.tif": frames,
}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("name", CASES)
def test_eight_bits_come_out_as_from_torchvision(tmp_path, name):
    loader = pytest.importorskip("torchvision.datasets.folder").default_loader
    image, options = CASES[name]()
    image.save(tmp_path / name, **options)
    expected = torch.from_numpy(np.array(loader(tmp_path / name))).permute(2, 0, 1)
    assert torch.equal(decode_image(tmp_path / name), expected)


def test_transparency_is_dropped_and_orientation_is_not_applied(tmp_path):
    """What the test above means, in numbers."""
    Image.new("RGBA", (32, 32), (200, 100, 50, 0)).save(tmp_path / "clear.png")
    assert decode_image(tmp_path / "clear.png")[:, 0, 0].tolist() == [200, 100, 50]
    upper = Image.new("RGB", (32, 32))
    upper.paste((255, 255, 255), (0, 0, 32, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    upper.save(tmp_path / "side.png", exif=exif)
    assert decode_image(tmp_path / "side.png")[0, :, 0].tolist() == [255] * 16 + [0] * 16


# More than eight bits


VALUES = np.linspace(0, 65535, 1024).astype(np.uint16).reshape(32, 32)
VALUES[0, 0] = 30000


def png(colour, samples):
    """A PNG file of 16 bits; Pillow writes grey ones only."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    rows = np.repeat(VALUES[:, :, None], samples, 2).astype(">u2")
    header = struct.pack(">IIBBBBB", 32, 32, 16, colour, 0, 0, 0)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def tiff(values, *, bits=16, photometric=1, kind=1, order="<"):
    """A TIFF file of one band; Pillow writes fewer kinds than it reads."""
    data = values if isinstance(values, bytes) else values.tobytes()
    tags = [
        (256, 32), (257, 32), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1),
        (278, 32), (279, len(data)), (339, kind),
    ]  # fmt: skip
    end = struct.pack(order + "H", len(tags))
    for tag, value in tags:
        end += struct.pack(order + "HHII", tag, 4, 1, value)
    start = b"II" if order == "<" else b"MM"
    return start + struct.pack(order + "HI", 42, 8 + len(data)) + data + end + bytes(4)


def jpeg2000():
    file = io.BytesIO()
    Image.fromarray(VALUES).save(file, "JPEG2000", irreversible=False)
    return file.getvalue()


def twelve_bits():
    """Pairs of values of 12 bits in three bytes."""
    first, second = (VALUES.reshape(-1, 2) >> 4).astype(np.uint32).T
    whole = (first << 12 | second).astype(">u4").view(np.uint8).reshape(-1, 4)
    return whole[:, 1:].tobytes()


DEEP = {
    "grey.png": lambda: png(0, 1),
    "rgb.png": lambda: png(2, 3),
    "grey-transparent.png": lambda: png(4, 2),
    "rgb-transparent.png": lambda: png(6, 4),
    "little.tif": lambda: tiff(VALUES),
    "big.tif": lambda: tiff(VALUES.astype(">u2"), order=">"),
    "white-is-zero.tif": lambda: tiff(65535 - VALUES, photometric=0),
    "grey.pgm": lambda: b"P5 32 32 65535\n" + VALUES.astype(">u2").tobytes(),
    "grey.jp2": jpeg2000,
}


@pytest.mark.parametrize("name", DEEP)
def test_of_sixteen_bits_the_upper_eight_are_kept(tmp_path, name):
    (tmp_path / name).write_bytes(DEEP[name]())
    image = decode_image(tmp_path / name)
    expected = torch.from_numpy((VALUES >> 8).astype(np.uint8))
    assert int(image[0, 0, 0]) == 117  # 30000 of 65535
    for channel in image:
        assert torch.equal(channel, expected)


def test_values_of_twelve_bits_have_their_own_range(tmp_path):
    (tmp_path / "x.tif").write_bytes(tiff(twelve_bits(), bits=12))
    assert decode_image(tmp_path / "x.tif")[0].flatten()[[0, -1]].tolist() == [117, 255]
    small = (VALUES >> 6).astype(">u2").tobytes()
    (tmp_path / "x.pgm").write_bytes(b"P5 32 32 1023\n" + small)
    assert decode_image(tmp_path / "x.pgm")[0].flatten()[[0, -1]].tolist() == [117, 255]


def test_sixteen_bits_are_resized_after_they_are_scaled(tmp_path):
    Image.fromarray(np.full((50, 70), 30000, np.uint16)).save(tmp_path / "x.png")
    assert decode_image(tmp_path / "x.png").unique().tolist() == [117]


FLOATS = np.linspace(0, 1, 1024, dtype=np.float32)
REFUSED = {
    "float.tif": lambda: tiff(FLOATS, bits=32, kind=3),
    "float-big.tif": lambda: tiff(FLOATS.astype(">f4"), bits=32, kind=3, order=">"),
    "float.pfm": lambda: b"Pf 32 32 -1.0\n" + FLOATS.tobytes(),
    "signed.tif": lambda: tiff(VALUES.view(np.int16), kind=2),
    "long.tif": lambda: tiff(VALUES.astype(np.uint32), bits=32),
    "long-signed.tif": lambda: tiff(VALUES.astype(np.int32), bits=32, kind=2),
    "double.tif": lambda: tiff(FLOATS.astype(np.float64), bits=64, kind=3),
    "empty.png": lambda: b"",
    "text.png": lambda: b"no image",
    "half.png": lambda: png(0, 1)[:700],
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_known_range_is_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(REFUSED[name]())
    with pytest.raises(DataError, match=rf"cannot read .*{name} as an image: ") as caught:
        decode_image(tmp_path / name)
    assert "\n" not in str(caught.value)
    if name.startswith("float"):
        assert "floating-point values have no known range" in str(caught.value)
