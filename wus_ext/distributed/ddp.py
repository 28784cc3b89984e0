"""Skip steps in several processes: ``DistributedDataParallel`` that sends only what trains.

In a full step the wrapper is torch's, bit for bit. In a skip step torch's reducer rests, as under
``no_sync``, and when backward has run one coalesced all-reduce averages the gradients of the
parameters that train. Which those are follows from the model's skip flags, so that every process
sends the same, whichever of its parameters got a gradient.

:func:`wus_ext.convert` and :func:`wus_ext.set_skip` turn a stock wrapper into this one, in place,
so importing this module is seldom needed.
"""

from __future__ import annotations

import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as StockDDP

from .._torch import after_backward
from ..engine.parameters import is_converted, skipped_now
from . import processes
from .averaging import average_gradients

__all__ = ["DistributedDataParallel", "check_parameters", "make_skip_aware", "make_stock"]

# Hooks whose result is the mean over processes: in a skip step a plain mean takes their place.
AVERAGING_HOOKS = frozenset(
    f"torch.distributed.algorithms.ddp_comm_hooks.{name}"
    for name in (
        "default_hooks.allreduce_hook",
        "default_hooks.fp16_compress_hook",
        "default_hooks.bf16_compress_hook",
        "powerSGD_hook.powerSGD_hook",
        "powerSGD_hook.batched_powerSGD_hook",
    )
)

if TYPE_CHECKING:  # whatever this is mixed in with
    _Wrapper = StockDDP
else:
    _Wrapper = object

# What a step does about gradients, as told to the processes that have joined.
SILENT, FULL, SKIP = range(3)


class SkipAware(_Wrapper):
    """Mixin of a wrapper that synchronises in a skip step only what the step trains."""

    #: Parameters that the skip step under way trains; None in a full step.
    _trained: tuple[nn.Parameter, ...] | None = None
    #: Whether torch's reducer waits for the backward pass of a full step to begin, and whether a
    #: skip step's backward pass, which came before, has made it stop to.
    _reducer_waits: bool = False
    _reducer_stopped: bool = False
    #: What the skip step under way, or the one that this process mirrors, will synchronise.
    _announced: tuple[nn.Parameter, ...] | None = None
    _sync_queued: bool = False
    _gradient_hooks: tuple[Any, ...] = ()

    def _pre_forward(self, *inputs: Any, **kwargs: Any) -> Any:
        self._begin_step()
        if self._trained is None:
            return super()._pre_forward(*inputs, **kwargs)
        synchronises = torch.is_grad_enabled() and self.require_backward_grad_sync
        self._announced = self._trained if synchronises else None
        with self.no_sync():
            return super()._pre_forward(*inputs, **kwargs)

    def _begin_step(self) -> None:
        self._trained = self._trained_now()
        for hook in self._gradient_hooks:
            hook.remove()
        self._gradient_hooks, self._sync_queued = (), False
        if self._trained is not None:
            _check_supported(self)

    def _trained_now(self) -> tuple[nn.Parameter, ...] | None:
        skipped = skipped_now(self.module)
        if not skipped:
            return None
        return tuple(
            parameter
            for parameter in self._module_parameters
            if parameter.requires_grad and id(parameter) not in skipped
        )

    def _post_forward(self, output: Any) -> Any:
        synchronises = torch.is_grad_enabled() and self.require_backward_grad_sync
        if self._trained is None:
            output = super()._post_forward(output)
            if synchronises:
                self._reducer_waits, self._reducer_stopped = True, False
                for tensor in _differentiable(output):
                    tensor.register_hook(self._on_full_backward)
            return output
        with self.no_sync():
            output = super()._post_forward(output)
        self.require_forward_param_sync = synchronises
        if torch.is_grad_enabled() and self._trained:
            self._await_backward(output, self._trained, synchronises)
        return output

    def _on_full_backward(self, grad: Tensor) -> None:
        if self._reducer_stopped:
            if self.find_unused_parameters:
                raise RuntimeError(
                    "DistributedDataParallel: with find_unused_parameters=True the backward pass "
                    "of a full step must come before that of a later skip step"
                )
            self.reducer.prepare_for_backward([])
        self._reducer_waits = self._reducer_stopped = False

    def _await_backward(
        self, output: Any, trained: tuple[nn.Parameter, ...], synchronises: bool
    ) -> None:
        # A parameter that held its wrapper would keep it alive: what the engine holds, too, the
        # garbage collector does not see.
        wrapper = weakref.ref(self)

        def on_gradient(grad: Tensor) -> None:
            ddp = wrapper()
            if ddp is None:
                return

            def synchronise() -> None:
                ddp._sync_queued = False
                ddp._average(trained)

            if ddp._reducer_waits:
                # Else it would take this step's gradients for those that it waits for.
                ddp.reducer._reset_state()
                ddp._reducer_waits, ddp._reducer_stopped = False, True
            if synchronises and not ddp._sync_queued:
                ddp._sync_queued = True
                # Queued twice: behind the reducer's own callback, if a full step's output is
                # part of the same backward pass.
                after_backward(lambda: after_backward(synchronise))

        # The outputs say where backward begins, also where no parameter gets a gradient; the
        # parameters, that it has begun, also where the output hides its tensors.
        for tensor in _differentiable(output):
            tensor.register_hook(on_gradient)
        self._gradient_hooks = tuple(parameter.register_hook(on_gradient) for parameter in trained)

    def _average(self, parameters: tuple[nn.Parameter, ...], *, joined: bool = False) -> None:
        average_gradients(
            parameters,
            self.process_group,
            self.device,
            joined=joined,
            over_active=self._join_config.enable and not self._divide_by_initial_world_size,
        )

    # Uneven inputs: processes that have joined mirror the collectives of those still at work.

    def join_hook(self, **kwargs: Any) -> Any:
        stock = super().join_hook(**kwargs)
        stock.main_hook = types.MethodType(_mirror_step, stock)
        return stock

    def _check_global_requires_backward_grad_sync(self, is_joined_rank: bool) -> bool | None:
        """Tells the processes that have joined which gradients this step will synchronise."""
        sent = torch.zeros(1 + len(self._module_parameters), dtype=torch.int32, device=self.device)
        if not is_joined_rank:
            if self._trained is None:
                sent[0] = FULL if self.require_backward_grad_sync else SILENT
            elif self._announced is not None:
                trained = set(map(id, self._announced))
                sent[0] = SKIP
                sent[1:] = torch.tensor([int(id(p) in trained) for p in self._module_parameters])
        work = dist.all_reduce(sent, op=dist.ReduceOp.MAX, group=self.process_group, async_op=True)
        if not is_joined_rank:
            return None
        work.wait()
        kind, *trains = sent.tolist()
        self._announced = None
        if kind == SKIP:
            pairs = zip(self._module_parameters, trains, strict=True)
            self._announced = tuple(parameter for parameter, its in pairs if its)
        return kind == FULL

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        for name in ("_trained", "_announced", "_gradient_hooks", "_sync_queued"):
            state.pop(name, None)
        return state


def _mirror_step(hook: Any) -> None:
    """What a process that has joined does in each step of the others."""
    ddp = hook.ddp
    type(hook).main_hook(hook)
    if ddp._announced is not None:
        if ddp._announced:
            ddp._average(ddp._announced, joined=True)
        ddp.require_forward_param_sync = True


class DistributedDataParallel(SkipAware, StockDDP):
    """:class:`torch.nn.parallel.DistributedDataParallel`, aware of skip steps.

    Same constructor, same full steps. A skip step sends one message, of the gradients that it
    trains: biases, usually. ``no_sync``, ``join``, buffers, ``gradient_as_bucket_view`` and
    ``find_unused_parameters`` work as in full steps. Gradients are averaged in their own dtype,
    also where one of torch's compressing communication hooks is registered.

    As in stock, every process must run the same steps: call :func:`wus_ext.set_skip` in all.

    Raises:
        ValueError: in the first skip step, for what rests on every step being the same or on
            torch's own reduction: ``static_graph``, ``mixed_precision`` of the wrapper, a
            communication hook that is not one of torch's averages, an optimizer that runs in
            backward, ``delay_all_reduce_named_params``, manual finalization.

    Example:
        >>> model = wus_ext.convert(torch.nn.Linear(3, 2))
        >>> dist = torch.distributed
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> ddp = wus_ext.distributed.DistributedDataParallel(model)
        >>> with wus_ext.skip_weight_updates(ddp):
        ...     ddp(torch.randn(4, 3)).mean().backward()
        >>> model.weight.grad is None, model.bias.grad is None
        (True, False)
        >>> dist.destroy_process_group()
    """


_aware_classes: dict[type, type] = {StockDDP: DistributedDataParallel}


def make_skip_aware(ddp: StockDDP) -> None:
    """Gives a stock wrapper the subclass of its own class that is aware of skip steps.

    Raises:
        ValueError: inside ``join()``, whose other processes could not follow.
    """
    stock = type(ddp)
    if issubclass(stock, SkipAware):
        return
    if ddp._join_config.enable:
        raise ValueError(
            "DistributedDataParallel: it became aware of skip steps inside join(); call "
            "wus_ext.convert on the wrapper before"
        )
    if stock not in _aware_classes:
        _aware_classes[stock] = types.new_class(f"Skip{stock.__name__}", (SkipAware, stock))
    ddp.__class__ = _aware_classes[stock]
    aware: Any = ddp
    aware._reducer_waits = aware._lazy_init_ran  # nobody watched the steps before


def check_parameters(model: nn.Module) -> None:
    """Refuses parameters that are parts of a flat one, which gets a gradient as a whole.

    Raises:
        ValueError: for a model in the older ``FullyShardedDataParallel``.
    """
    if any(getattr(p, "_fsdp_flattened", False) for p in model.parameters()):
        raise ValueError(
            "model: FullyShardedDataParallel flattens weights and biases into one parameter, "
            "which cannot skip; use torch.distributed.fsdp.fully_shard (FSDP2)"
        )


def set_wrappers(model: nn.Module, change: Callable[[StockDDP], None]) -> None:
    """Applies :func:`make_skip_aware` or :func:`make_stock` to every wrapper in a model."""
    for module in model.modules():
        if isinstance(module, StockDDP):
            change(module)


def warn_if_unseen(model: nn.Module) -> None:
    """Warns of a model that is about to skip inside a wrapper which could not know."""
    modules = list(model.modules())
    wrapped = any(isinstance(module, StockDDP) for module in modules)
    sharded = any(hasattr(parameter, "full_tensor") for parameter in model.parameters())
    converted = any(is_converted(module) for module in modules)
    if processes.count() > 1 and not (wrapped or sharded or converted):
        warnings.warn(
            "set_skip: in several processes switch the DistributedDataParallel wrapper, which "
            f"cannot notice that the {type(model).__name__} inside skips, or convert the model",
            stacklevel=3,
        )


def make_stock(ddp: StockDDP) -> None:
    """Undoes :func:`make_skip_aware`."""
    for stock, aware in _aware_classes.items():
        if type(ddp) is aware:
            ddp.__class__ = stock


def adopt_wrapper(model: nn.Module) -> None:
    """Makes a stock wrapper skip-aware in the middle of its forward pass.

    So a wrapper needs no call of its own: that its model is converted is enough.
    """
    if torch.compiler.is_compiling():
        return
    ddp = StockDDP._get_active_ddp_module()
    if ddp is None or isinstance(ddp, SkipAware):
        return
    if ddp._join_config.enable and not skipped_now(ddp.module):
        return  # too late for this join(), which full steps do not mind
    make_skip_aware(ddp)
    ddp._begin_step()


def _differentiable(output: Any) -> Iterator[Tensor]:
    for tensor in nn.parallel.distributed._find_tensors(output):
        if tensor.requires_grad:
            yield tensor


def _check_supported(ddp: StockDDP) -> None:
    advice = None
    if ddp.static_graph:
        advice = "static_graph=True promises that every step is the same; leave it out"
    elif ddp.mixed_precision is not None:
        advice = "mixed_precision is the wrapper's own; use torch.autocast"
    elif ddp._delay_all_reduce_params:
        advice = "delay_all_reduce_named_params takes gradients away from the wrapper; leave it out"
    elif ddp._use_python_reducer:
        advice = "torch._dynamo.config.optimize_ddp='python_reducer'; use another setting"
    elif getattr(ddp, "_require_manual_backward_finalization", False):
        advice = "require_manual_backward_finalization is set; leave it out"
    else:
        for hook, state in ddp._comm_hooks:
            advice = advice or _about_hook(hook, state, ddp.process_group)
    if advice:
        raise ValueError(f"DistributedDataParallel cannot run a skip step: {advice}")


def _about_hook(hook: Any, state: Any, group: Any) -> str | None:
    name = f"{hook.__module__}.{getattr(hook, '__qualname__', hook.__name__)}"
    if name not in AVERAGING_HOOKS:
        known = ", ".join(sorted(known.rsplit(".", 1)[1] for known in AVERAGING_HOOKS))
        return f"the communication hook {name} need not average gradients; use one of {known}"
    own = getattr(state, "process_group", state)
    if own is not None and own is not group:
        return f"the communication hook {name} has another process group; use the wrapper's"
    return None
