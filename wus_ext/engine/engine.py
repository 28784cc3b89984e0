"""A converted model's engine: which layers defer in a step, and how the chains they form run.

The model's own ``forward`` runs in every step. In a step that runs fused a convolution or linear
layer returns a tensor that has not been computed yet; norm, residual sum, ReLU, pooling and dropout
join it to a longer chain (``csrc/deferral``), and what else touches it has it computed first. So a
chain runs at its first use, as one operator of :mod:`wus_ext.engine.chains`.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from .._build import deferral
from .._torch import in_a_transform, is_traced
from ..nn import Conv2d, Linear, SkipLayer, is_frozen, uses_batch_statistics
from .activation import Act, Kind
from .autograd import Norm
from .chains import Notes, resume, run_conv, run_linear
from .conv.choice import Library, cast
from .conv.measure import Measured
from .conv.weight import Weight
from .dropout import drop
from .options import SkipOptions
from .packed_weights import PackedWeights
from .plan import ConvPlan, Key, Plan, plan_conv, plan_linear, why_not
from .storage_access import settle_before_storage_access
from .support import takes

logger = logging.getLogger("wus_ext")


@dataclass(slots=True)
class _Layer:
    """The plans of one layer; None: such a call runs by itself."""

    ref: weakref.ref[nn.Module]
    plans: dict[Key, Plan | None] = field(default_factory=dict)


class Engine:
    """What a converted model's root holds: options, and what was made of its weights.

    A copy of the model starts anew.
    """

    MOST_PLANS = 64
    #: Without gradients a chain over fewer takes more time to begin than it saves.
    FEW_VALUES = 1 << 20

    def __init__(self, options: SkipOptions, choices: Mapping[str, str] | None = None) -> None:
        self.options = options
        self.measured = Measured(choices or {})
        self.packed = PackedWeights(options.memory_budget)
        #: The chains of the first step that runs fused, for the log; then None.
        self.record: list[tuple[nn.Module, str]] | None = []
        self._reported = False
        self.notes: Notes | None = None
        self._layers: dict[int, _Layer] = {}
        #: Shapes of inputs for which no layer deferred without gradients; whether one has now.
        self._idle: set[Key] = set()
        self._deferred = False
        self._drop_ins: WeakSet[nn.Module] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        return Engine(self.options, self.measured.names)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Engine, (self.options, self.measured.names))

    def begin(self, inputs: tuple[Any, ...]) -> Any | None:
        """Lets layers defer in the forward pass that begins now, or None: all run by themselves.

        Args:
            inputs: of the model.
        """
        if not self.options.fuse or in_a_transform() or is_traced():
            return None
        if not torch.is_grad_enabled() and _shapes(inputs) in self._idle:
            return None
        self._deferred = False
        settle_before_storage_access()
        self.packed.begin_step()
        observed = self.record is not None or self.notes is not None
        session = deferral.Session(self, observed)
        return session if session.begin() else None

    def remember(self, inputs: tuple[Any, ...]) -> None:
        """Remembers whether the forward pass that ends now was worth a session."""
        if not torch.is_grad_enabled() and not self._deferred:
            if len(self._idle) == self.MOST_PLANS:
                self._idle.clear()
            self._idle.add(_shapes(inputs))

    def report(self, name: str) -> None:
        """Logs what ran fused in the first step that did."""
        if self._reported:
            return
        self._reported = True
        chains, self.record = self.record or [], None
        if chains:
            logger.info("%s: fused %d chains of layers", name, len(chains))
        else:
            logger.info("%s runs layer by layer: no layer has a fused form for its input", name)

    @contextmanager
    def recording(self) -> Iterator[list[tuple[nn.Module, str]]]:
        """The chains that run inside, each as its layer and the names of its steps."""
        before, self.record, self._reported = self.record, [], True
        try:
            yield self.record
        finally:
            self.record = before

    @contextmanager
    def explaining(self) -> Iterator[Notes]:
        """How the layers that are called inside run, and why some run by themselves."""
        self.notes = Notes()
        try:
            yield self.notes
        finally:
            self.notes = None

    def end_window(self, layers: Collection[nn.Module] | None = None) -> None:
        """Weights of these layers, or all, are about to change: drops what was made of them."""
        self.packed.drop(layers)
        if self.options.full == "stock":
            self.packed.give_back()

    def holds_frozen(self, root: nn.Module) -> bool:
        """Whether a layer that may run fused has a weight that requires no gradient."""
        if self._drop_ins is None:
            kinds = (nn.Conv2d, nn.Linear)
            layers = [layer for layer in root.modules() if isinstance(layer, kinds)]
            self._drop_ins = WeakSet(layer for layer in layers if isinstance(layer, SkipLayer))
        return any(map(is_frozen, self._drop_ins))

    def convolve(self, conv: Conv2d, input: Tensor) -> Tensor | None:
        """The deferred call of a convolution, or None where it must run by itself."""
        weight, trains = self._weight(conv, input)
        if weight is None:
            return None
        bias = conv._constant(conv._parameters.get("bias"))
        key = (
            deferral.signature(input, weight, bias),
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            conv.padding_mode,
        )
        plan = self._plan(conv, key, input, weight, bias)
        if plan is None:
            return None
        assert isinstance(plan, ConvPlan)
        if trains and not torch.is_grad_enabled() and not plan.faster:
            return None  # nothing is saved for backward, and no norm folds away
        self._deferred = True
        return deferral.begin_chain(
            conv, plan, True, input, weight, bias, trains, plan.sizes, plan.dtype
        )

    def multiply(self, linear: Linear, input: Tensor) -> Tensor | None:
        """The deferred call of a linear layer, or None where it must run by itself."""
        weight, trains = self._weight(linear, input)
        if weight is None:
            return None
        bias = linear._constant(linear._parameters.get("bias"))
        key = deferral.signature(input, weight, bias)
        plan = self._plan(linear, key, input, weight, bias)
        if plan is None:
            return None
        self._deferred = True
        return deferral.begin_chain(
            linear, plan, False, input, weight, bias, trains, plan.sizes, plan.dtype
        )

    def normalises(self, norm: nn.Module, input: Tensor) -> bool:
        """Whether a batch norm may be the first layer of a chain."""
        return (
            isinstance(norm, nn.BatchNorm2d)
            and (norm.skip_wgrad or self._runs_outside(norm))
            and torch.is_grad_enabled()
            and takes(input)
            and input.dim() == 4
            and deferral.suggests_channels_last(input)
            and uses_batch_statistics(norm)
        )

    def _weight(self, layer: SkipLayer, input: Tensor) -> tuple[Tensor | None, bool]:
        """The layer's weight, if the layer may run fused on `input`, and whether it trains."""
        weight = layer._parameters.get("weight")
        trains = not layer.skip_wgrad and (weight is None or weight.requires_grad)
        if trains:  # what is made of a weight that trains serves one call only
            self.packed.drop((layer,))
        if (
            type(input) not in (Tensor, nn.Parameter)
            or weight is None
            or type(weight) not in (Tensor, nn.Parameter)
            or not (layer.skip_wgrad or self._runs_outside(layer))
            or (not torch.is_grad_enabled() and input.numel() < self.FEW_VALUES)
        ):
            self._by_itself(layer, input)
            return None, trains
        return weight, trains

    def _runs_outside(self, layer: nn.Module) -> bool:
        """Whether a layer runs fused outside of a window."""
        return self.options.full == "fused" or is_frozen(layer)

    def _plan(
        self, layer: nn.Module, key: Key, input: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Plan | None:
        known = self._layers.get(id(layer))
        if known is None or known.ref() is not layer:
            layers, name = self._layers, id(layer)
            known = layers[name] = _Layer(weakref.ref(layer, lambda _: layers.pop(name, None)))
        if key not in known.plans:
            if len(known.plans) == self.MOST_PLANS:
                known.plans.clear()
            known.plans[key] = (
                plan_conv(layer, input, weight, bias, self.options.algo)
                if isinstance(layer, nn.Conv2d)
                else plan_linear(input, weight, bias)
            )
        plan = known.plans[key]
        if plan is None:
            self._by_itself(layer, input)
        return plan

    def _by_itself(self, layer: nn.Module, input: Tensor) -> None:
        """Notes why a layer runs by itself, if somebody asked."""
        if self.notes is not None:
            self.notes.reasons[layer] = why_not(layer, input)

    # Called back by csrc/deferral.

    def observe(
        self,
        layer: nn.Module,
        plan: Plan | None,
        norm: bool,
        residual: bool,
        kind: int,
        pool: bool,
        dropout: bool,
    ) -> None:
        """Notes which steps a chain has, and how it runs where there is nothing to choose."""
        if self.record is not None:
            steps = {
                "conv" if isinstance(plan, ConvPlan) else "linear": plan is not None,
                "norm": norm,
                "add": residual,
                Kind(kind).name.lower(): kind != Kind.NONE,
                "pool": pool,
                "dropout": dropout,
            }
            self.record.append((layer, " ".join(step for step, there in steps.items() if there)))
        if self.notes is not None and isinstance(plan, ConvPlan) and plan.library is not None:
            self.notes.algorithms[layer] = plan.library.name

    def cast(
        self, layer: nn.Module, weight: Tensor, library: Library, dtype: torch.dtype
    ) -> Tensor:
        """A weight that stands still as the library takes it; kept, for no gradient is."""
        self.packed.saves(layer, weight, 0)
        return cast(Weight(layer, weight.detach(), (weight,)), self.packed, library, dtype)

    def run(
        self,
        layer: SkipLayer,
        plan: Plan,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight_trains: bool,
        norm: tuple[Any, ...] | None,
        residual: Tensor | None,
        kind: int,
        slope: float,
        pool: tuple[int, int, int, bool] | None,
        noise: Tensor | None,
        p: float,
    ) -> Tensor:
        """A chain's value; `kind` and `slope` are an activation's."""
        act = Act.of(kind, slope, pool)
        if not isinstance(plan, ConvPlan):
            return run_linear(self, layer, plan, input, weight, bias, weight_trains, act, noise, p)
        return run_conv(
            self,
            layer,
            plan,
            input,
            weight,
            bias,
            weight_trains,
            None if norm is None else Norm(*norm),
            residual,
            act,
        )

    def resume(
        self,
        image: Tensor,
        norm: tuple[Any, ...] | None,
        residual: Tensor | None,
        kind: int,
        slope: float,
        pool: tuple[int, int, int, bool] | None,
    ) -> Tensor | None:
        """A chain's value behind a convolution that ran alone, or None: its layers run alone."""
        act = Act.of(kind, slope, pool)
        return resume(image, None if norm is None else Norm(*norm), residual, act)

    def drop(self, input: Tensor, p: float) -> Tensor | None:
        """Dropout of an ordinary tensor, or None for stock's."""
        return drop(input, p)


def _shapes(inputs: tuple[Any, ...]) -> Key:
    return tuple(x.shape if isinstance(x, Tensor) else type(x) for x in inputs)
