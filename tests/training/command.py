"""``wus-ext`` with the tiny network and images, for processes of their own.

python -m tests.training.command train --out DIR ...
"""

import sys

from wus_ext.cli import main
from wus_ext.training import Trainer

from . import tiny

#: Skips in its third epoch.
SETTINGS = [
    *("--method", "wus", "--epochs", "4", "--batch-size", "8", "--lr", "0.05"),
    *("--warmup", "1", "--patience", "1", "--threshold", "100", "--device", "cpu"),
]


def patched(monkeypatch=None):
    """Let every trainer train the tiny network, for good or until ``monkeypatch`` is undone."""
    original = Trainer.__init__

    def init(self, config, **options):
        original(self, config, **{"data": tiny.data(), "build": tiny.build, **options})

    if monkeypatch is None:
        Trainer.__init__ = init
    else:
        monkeypatch.setattr(Trainer, "__init__", init)


if __name__ == "__main__":
    patched()
    sys.exit(main(sys.argv[1:]))
