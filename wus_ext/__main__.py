"""``python -m wus_ext`` is the command ``wus-ext``."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
