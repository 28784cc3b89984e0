"""The command line on a folder of photographs: train, evaluate, export.

    python examples/command_line.py [--out DIR]

Pieces of two photographs, a temple and a flower, stand for images of one's own.
"""

import shlex
import tempfile
from pathlib import Path

from options import options
from real_images import photo
from torchvision.utils import save_image

from wus_ext.cli import main as wus_ext

COMMANDS = """
train --dataset folder --data-dir {data} --image-size 64 --model torchvision:resnet18
  --method wus --warmup 1 --epochs {epochs} --batch-size 16 --validation 0.2 --out {out}/whole
train --dataset folder --data-dir {data} --image-size 64 --model torchvision:resnet18
  --weights {out}/whole --train biases --epochs 1 --batch-size 16 --out {out}/tuned
evaluate {out}/tuned --worst 2
export {out}/tuned --out {out}/photos.safetensors
"""


def make_folder(data: Path) -> None:
    """train/<class>/*.png and test/<class>/*.png of 80x96 pixels."""
    for name in ("china", "flower"):
        whole = photo(name, 400)[0]
        for index in range(40):
            row, column = divmod(index, 8)
            piece = whole[:, 64 * row : 64 * row + 80, 43 * column : 43 * column + 96]
            folder = data / ("test" if index % 4 == 3 else "train") / name
            folder.mkdir(parents=True, exist_ok=True)
            save_image(piece, folder / f"{index}.png")


def main(arguments=None) -> None:
    given = options(__doc__, arguments, epochs=4, out=None)

    with tempfile.TemporaryDirectory() as temporary:
        out = Path(given.out or temporary)
        make_folder(out / "data")
        for line in COMMANDS.replace("\n  ", " ").strip().splitlines():
            line = line.format(data=out / "data", out=out, epochs=given.epochs)
            print(f"\n$ wus-ext {line}", flush=True)
            if wus_ext(shlex.split(line)):
                raise SystemExit(1)


if __name__ == "__main__":
    main()
