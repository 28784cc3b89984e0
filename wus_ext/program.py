"""The program that a converted model runs in a skip step, derived from it by torch.fx.

With ``full="fused"`` it runs in full steps as well.

The model's own ``forward`` is traced once, with every layer a leaf; chains of layers that belong
together become one call of :mod:`wus_ext.chains`. The program holds no parameters: it runs on the
model's own layers. It is made again when the model changes (a layer replaced, a hook added,
train/eval switched), and where tracing fails there is none and the model runs layer by layer.
"""

from __future__ import annotations

import logging
import operator
import threading
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from . import nn as skip_nn
from .algorithms import Act
from .chains import ConvChain, DropoutChain, LinearChain
from .options import SkipOptions
from .packing import PackedWeights

logger = logging.getLogger("wus_ext")

# torch.fx patches torch.nn.Module for all threads while it traces.
_tracing = threading.Lock()

CONVS = (skip_nn.Conv2d,)
NORMS = (skip_nn.BatchNorm2d, nn.BatchNorm2d)
RELU_FUNCTIONS = (F.relu, F.relu_, torch.relu, torch.relu_)
POOL_FUNCTIONS = (F.max_pool2d, torch.max_pool2d)
ADD_FUNCTIONS = (operator.add, operator.iadd, torch.add)


class Program:
    """The fused form of a model's forward pass of one tensor.

    Args:
        forward: the model's own, unbound ``forward``.
        model: the model, for tracing only; each call is handed it again.
        options: how chains run.
        packed: where chains keep transformed weights.

    Raises:
        Exception: whatever tracing raises for a model that torch.fx cannot read.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[..., Any],
        options: SkipOptions,
        packed: PackedWeights,
    ) -> None:
        graph = _trace(model, forward)
        fuser = _Fuser(model, graph, options, packed)
        fuser.fuse()
        self.chains = fuser.chains
        self._scope = _Scope(self.chains)
        code = graph.python_code("self")
        namespace = dict(code.globals)
        exec(compile(code.src, f"<skip program of {type(model).__name__}>", "exec"), namespace)
        self._run = namespace["forward"]

    def __call__(self, model: nn.Module, input: Tensor) -> Any:
        channels_last = _is_channels_last(input) or any(
            _is_channels_last(chain.conv.weight)
            for chain in self.chains.values()
            if isinstance(chain, ConvChain)
        )
        return self._run(self._scope.on(model), input, channels_last)


class ProgramCache:
    """A converted model's programs and transformed weights; a copy of the model starts anew.

    There is one program for each state of the model (training, evaluation, hooks) and of its
    surroundings (autocast, no_grad), or None where it cannot be traced.
    """

    MOST_PROGRAMS = 8

    def __init__(self, options: SkipOptions) -> None:
        self.options = options
        self.packed = PackedWeights(options.memory_budget)
        self._programs: dict[tuple, Program | None] = {}

    def __deepcopy__(self, memo: dict) -> ProgramCache:
        return ProgramCache(self.options)

    def __reduce__(self) -> tuple:
        return (ProgramCache, (self.options,))

    def program(
        self, model: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict
    ) -> Program | None:
        """The program for this call, or None where the model must run layer by layer."""
        if (
            not self.options.fuse
            or in_a_transform()
            or kwargs
            or len(args) != 1
            or type(args[0]) is not Tensor
            or nn.modules.module._has_any_global_hook()
        ):
            return None
        now = (signature(model), ambient())
        if now not in self._programs:
            if len(self._programs) == self.MOST_PROGRAMS:
                self._programs.clear()
            self._programs[now] = self._derive(model, forward)
        return self._programs[now]

    def _derive(self, model: nn.Module, forward: Callable[..., Any]) -> Program | None:
        try:
            with _tracing:
                program = Program(model, forward, self.options, self.packed)
        except Exception as error:  # torch.fx and user code may raise anything
            logger.info("%s runs layer by layer: %s", type(model).__name__, error)
            return None
        logger.info("%s: fused %d chains", type(model).__name__, len(program.chains))
        return program

    def end_window(self, layers: Collection[nn.Module] | None = None) -> None:
        """Weights of these layers, or all, are about to change: drops what was made of them."""
        if self.options.full == "fused":
            self.packed.expire(layers)
        elif layers is None:
            self.packed.clear()
        else:
            self.packed.drop(layers)


class _Scope:
    """What ``self`` is to the program's code: the chains, and the model for all else."""

    def __init__(self, chains: dict[str, Any]) -> None:
        self.__dict__.update(chains)

    def on(self, model: nn.Module) -> _Scope:
        scope = _Scope(self.__dict__)
        scope.__dict__["_wus_model"] = model
        return scope

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_wus_model"], name)


def signature(model: nn.Module) -> tuple:
    """What a program depends on: the layers, their types and modes, and who has hooks."""
    return tuple(
        (id(module), type(module), module.training, has_hooks(module)) for module in model.modules()
    )


def ambient() -> tuple:
    """What a ``with`` statement inside forward may change and a graph does not record."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")),
    )


def in_a_transform() -> bool:
    """Whether torch.func or forward-mode differentiation runs, which fused chains do not know."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody watches this module's calls; then it is called, never fused."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _is_channels_last(tensor: Tensor) -> bool:
    return (
        tensor.dim() == 4
        and tensor.is_contiguous(memory_format=torch.channels_last)
        and not tensor.is_contiguous()
    )


class _Tracer(fx.Tracer):
    traced_func_name = "_forward_of_one_tensor"
    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self._outside = self._surroundings()

    def create_proxy(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        if self._surroundings() != self._outside:
            raise fx.proxy.TraceError(
                "forward runs a part under no_grad, autocast, saved-tensor hooks or checkpoint"
            )
        return super().create_proxy(*args, **kwargs)

    @staticmethod
    def _surroundings() -> tuple:
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        return (*ambient(), hooks)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter):
            raise fx.proxy.TraceError("forward makes a tensor that tracing would take for constant")
        return super().create_arg(a)

    def is_leaf_module(self, module: nn.Module, qualname: str) -> bool:
        return (
            isinstance(module, skip_nn.SkipLayer)
            or has_hooks(module)
            or super().is_leaf_module(module, qualname)
        )


def _trace(model: nn.Module, forward: Callable[..., Any]) -> fx.Graph:
    """The graph of ``forward(model, input)``; other arguments have their defaults."""

    def _forward_of_one_tensor(self: nn.Module, input: Tensor) -> Any:
        return forward(self, input)

    cls = type(model)
    cls._forward_of_one_tensor = _forward_of_one_tensor
    try:
        return _Tracer().trace(model)
    finally:
        del cls._forward_of_one_tensor


class _Fuser:
    """Rewrites a graph: each chain of nodes becomes one call."""

    def __init__(
        self, model: nn.Module, graph: fx.Graph, options: SkipOptions, packed: PackedWeights
    ) -> None:
        self.model = model
        self.graph = graph
        self.options = options
        self.packed = packed
        self.chains: dict[str, Any] = {}
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.order = {node: i for i, node in enumerate(graph.nodes)}

    def fuse(self) -> None:
        (input,) = [node for node in self.graph.nodes if node.op == "placeholder"]
        with self.graph.inserting_after(input):
            self.channels_last = self.graph.placeholder("channels_last")
        for node in list(self.graph.nodes):
            if node not in self.order:
                continue
            if self._layer(node, CONVS):
                self._fuse_conv(node)
            elif self._layer(node, (skip_nn.Linear,)):
                self._fuse_linear(node)
            elif self._layer(node, (nn.Dropout,)):
                self._replace([node], DropoutChain(self._module(node)), node.args)
        for node in self.graph.nodes:
            chain = self._chain(node)
            if isinstance(chain, ConvChain):
                chain.free_layout = all(self._is_conv_chain(user) for user in node.users)
        if self.options.epilogues:
            self._link()
        self.graph.lint()

    def _link(self) -> None:
        """Introduces chains to the one chain of their kind that takes their output, if any."""
        for node in self.graph.nodes:
            users = list(node.users)
            if len(users) != 1:
                continue
            chain, above = self._chain(node), self._chain(users[0])
            takes_once = users[0].args[:1] == (node,) and users[0].args.count(node) == 1
            if (
                isinstance(chain, ConvChain | LinearChain)
                and type(above) is type(chain)
                and takes_once
            ):
                chain.above = above

    def _fuse_conv(self, conv: fx.Node) -> None:
        nodes, layers = [conv], [self._module(conv)]
        norm, residual, act = None, None, Act.NONE
        if node := self._next(nodes, lambda n: self._layer(n, NORMS)):
            norm = self._module(node)
            layers.append(norm)
        if (node := self._next(nodes, self._is_add)) is not None:
            first, second = node.args[:2]
            residual = second if first is nodes[-2] else first
            layers.append(None)
        if node := self._next(nodes, self._is_relu):
            act = Act.RELU
            layers.append(self._step(node))
            if residual is None and (node := self._next(nodes, self._is_pool)):
                act = Act.RELU_POOL
                layers.append(self._step(node))
        chain = ConvChain(
            conv=self._module(conv),
            norm=norm,
            act=act,
            layers=layers,
            packed=self.packed,
            options=self.options,
        )
        arguments = (conv.args[0], self.channels_last)
        self._replace(nodes, chain, arguments if residual is None else (*arguments, residual))

    def _fuse_linear(self, linear: fx.Node) -> None:
        nodes, layers = [linear], [self._module(linear)]
        relu, dropout = False, None
        if node := self._next(nodes, self._is_relu):
            relu = True
            layers.append(self._step(node))
            if node := self._next(nodes, lambda n: self._layer(n, (nn.Dropout,))):
                dropout = self._module(node)
                layers.append(dropout)
        chain = LinearChain(self._module(linear), relu, dropout, layers, self.packed, self.options)
        self._replace(nodes, chain, linear.args)

    def _next(self, nodes: list[fx.Node], fits: Callable[[fx.Node], bool]) -> fx.Node | None:
        """The only user of the chain so far, appended to it, if it fits."""
        users = list(nodes[-1].users)
        if len(users) != 1 or users[0] not in self.order or not fits(users[0]):
            return None
        if any(map(self._may_mutate, self._between(nodes[-1], users[0]))):
            return None  # the chain runs where its last node stands: its inputs must still be whole
        nodes.append(users[0])
        return users[0]

    def _between(self, first: fx.Node, last: fx.Node) -> list[fx.Node]:
        start, end = self.order[first], self.order[last]
        return [node for node, i in self.order.items() if start < i < end]

    def _may_mutate(self, node: fx.Node) -> bool:
        """Whether a node may write into a tensor that it was given."""
        if node.op == "call_module":
            module = self.modules.get(node.target)
            return module is not None and getattr(module, "inplace", False)
        name = node.target if isinstance(node.target, str) else node.target.__name__
        in_place = name.endswith("_") and not name.endswith("__")
        return (
            in_place
            or node.kwargs.get("inplace", False) is not False
            or "out" in node.kwargs
            or name in ("iadd", "isub", "imul", "itruediv", "setitem", "__setitem__")
            or (node.target is F.relu and True in node.args[1:])
        )

    def _replace(self, nodes: list[fx.Node], chain: Any, arguments: tuple) -> None:
        """One call in the place of the last node, where all arguments are known."""
        name = f"skip_chain_{len(self.chains)}"
        self.chains[name] = chain
        last = nodes[-1]
        with self.graph.inserting_before(last):
            call = self.graph.call_module(name, arguments)
        last.replace_all_uses_with(call)
        for node in reversed(nodes):
            self.graph.erase_node(node)
            del self.order[node]

    def _module(self, node: fx.Node) -> nn.Module:
        return self.modules[node.target]

    def _layer(self, node: fx.Node, kinds: tuple[type, ...]) -> bool:
        """Whether a node calls a layer of exactly one of these types, of one tensor, unwatched."""
        return (
            node.op == "call_module"
            and type(self.modules.get(node.target)) in kinds
            and len(node.args) == 1
            and not node.kwargs
            and not has_hooks(self._module(node))
        )

    def _step(self, node: fx.Node) -> Callable[[Tensor], Tensor]:
        """A node of one tensor as a function, for the unfused path."""
        if node.op == "call_module":
            return self._module(node)
        rest, kwargs = node.args[1:], dict(node.kwargs)
        if node.op == "call_method":
            return lambda input: getattr(input, node.target)(*rest, **kwargs)
        return lambda input: node.target(input, *rest, **kwargs)

    def _is_relu(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return self._layer(node, (nn.ReLU,))
        if node.op == "call_method":
            return node.target in ("relu", "relu_")
        return node.op == "call_function" and node.target in RELU_FUNCTIONS

    def _is_pool(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            if not self._layer(node, (nn.MaxPool2d,)):
                return False
            pool = self._module(node)
            options = {
                name: getattr(pool, name)
                for name in ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
            }
            return not pool.return_indices and _is_2x2(**options)
        if node.op != "call_function" or node.target not in POOL_FUNCTIONS:
            return False
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
        options = dict(zip(names, node.args[1:], strict=False)) | dict(node.kwargs)
        return not options.pop("return_indices", False) and _is_2x2(**options)

    def _is_add(self, node: fx.Node) -> bool:
        """Whether a node adds two different tensors and nothing else."""
        is_add = (node.op == "call_function" and node.target in ADD_FUNCTIONS) or (
            node.op == "call_method" and node.target in ("add", "add_")
        )
        return (
            is_add
            and len(node.args) == 2
            and not node.kwargs
            and all(isinstance(arg, fx.Node) for arg in node.args)
            and node.args[0] is not node.args[1]
            and self._may_add(node)
        )

    def _may_add(self, node: fx.Node) -> bool:
        # An in-place sum writes into its first operand, which a fused one leaves alone: nobody
        # else may look at it.
        in_place = node.target in (operator.iadd, "add_")
        return not in_place or len(node.args[0].users) == 1

    def _is_conv_chain(self, node: fx.Node) -> bool:
        return isinstance(self._chain(node), ConvChain)

    def _chain(self, node: fx.Node) -> Any:
        """The chain that a node calls, or None."""
        return self.chains.get(node.target) if node.op == "call_module" else None


def _is_2x2(
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> bool:
    def all_are(value: Any, number: int) -> bool:
        return value in (number, (number, number), [number, number])

    return (
        all_are(kernel_size, 2)
        and (stride is None or stride in ((), []) or all_are(stride, 2))
        and all_are(padding, 0)
        and all_are(dilation, 1)
        and ceil_mode is False
    )
