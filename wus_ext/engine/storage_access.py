"""``Tensor.data_ptr`` and ``Tensor.untyped_storage`` of a tensor that has not been computed yet.

Every other way to a tensor's values leads through an operator or through its sizes and strides,
where ``csrc/deferral`` computes it first. These two ask for memory at once.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from .._build import deferral


@functools.cache
def settle_before_storage_access() -> None:
    """Has both methods compute a deferred tensor first; others are as they were. Once is enough."""
    for name in ("data_ptr", "untyped_storage"):
        setattr(Tensor, name, _settling(getattr(Tensor, name)))


def _settling(method: Any) -> Any:
    @functools.wraps(method)
    def settled(self: Tensor) -> Any:
        if deferral.is_deferred(self):
            deferral.settle(self)
        return method(self)

    return settled
