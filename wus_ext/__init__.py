"""wus_ext: skip steps for PyTorch. Training with frozen weights that costs what it should.

Modules that are imported by their names: :mod:`wus_ext.training` (runs on image sets),
:mod:`wus_ext.methods.rules` (when to skip), :mod:`wus_ext.profiling`,
:mod:`wus_ext.integrations.lightning` and :mod:`wus_ext.integrations.transformers`.

>>> model = wus_ext.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()))
>>> with wus_ext.skip_weight_updates(model):
...     model(torch.randn(2, 3, 8, 8)).mean().backward()
>>> [name for name, p in model.named_parameters() if p.grad is not None]
['0.bias']
"""

from . import distributed, functional, models, nn
from ._build import build_info
from ._version import __version__
from .conversion.convert import convert, describe, measured, packed_bytes, revert
from .conversion.windows import is_skipping, set_skip, skip_weight_updates
from .methods.policy import WUS, WUSLR
from .profiling import Profile, profile

__all__ = [
    "WUS",
    "WUSLR",
    "Profile",
    "__version__",
    "build_info",
    "convert",
    "describe",
    "distributed",
    "functional",
    "is_skipping",
    "measured",
    "models",
    "nn",
    "packed_bytes",
    "profile",
    "revert",
    "set_skip",
    "skip_weight_updates",
]
