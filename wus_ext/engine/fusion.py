"""Which nodes of a graph form a chain: each becomes one call of :mod:`wus_ext.engine.chains`."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .. import nn as skip_nn
from .chains import ConvChain, DropoutChain, LinearChain
from .conv.algorithm import Act
from .options import SkipOptions
from .packed_weights import PackedWeights
from .tracing import has_hooks

CONVS = (skip_nn.Conv2d,)
NORMS = (skip_nn.BatchNorm2d, nn.BatchNorm2d)
RELU_FUNCTIONS = (F.relu, F.relu_, torch.relu, torch.relu_)
POOL_FUNCTIONS = (F.max_pool2d, torch.max_pool2d)
ADD_FUNCTIONS = (operator.add, operator.iadd, torch.add)


def fuse(
    model: nn.Module, graph: fx.Graph, options: SkipOptions, packed: PackedWeights
) -> dict[str, Any]:
    """Rewrites ``graph``, each chain of nodes to one call; returns the chains by target name."""
    fuser = _Fuser(model, graph, options, packed)
    fuser.fuse()
    return fuser.chains


class _Fuser:
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
