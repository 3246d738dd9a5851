# SPDX-License-Identifier: Apache-2.0
"""``Program``: one FX graph, its lazily loaded parameters and what is known about the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch._subclasses import FakeTensorMode

from gptq_compile.errors import ModelError, PassError


@dataclass
class _Entry:
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]


class ParamStore:
    """Named tensors that are read when asked for, with ties (two names, one tensor).

    Reading is the source's business (a safetensors shard, a GGUF file, memory); the store neither caches nor copies,
    so a model larger than memory can be walked one tensor at a time.
    """

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._ties: dict[str, str] = {}

    def add(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, load: Callable[[], Tensor]) -> None:
        """Registers a tensor to be read by ``load`` on demand."""
        self._entries[name] = _Entry(tuple(shape), dtype, load)

    def set(self, name: str, tensor: Tensor) -> None:
        """Puts a tensor that is already in memory."""
        tensor = tensor.detach()
        self.add(name, tuple(tensor.shape), tensor.dtype, lambda: tensor)

    def tie(self, name: str, to: str) -> None:
        """Makes ``name`` another name of ``to``."""
        self._ties[name] = self.canonical(to)

    def canonical(self, name: str) -> str:
        """The name under which a (possibly tied) tensor is stored."""
        return self._ties.get(name, name)

    def __contains__(self, name: str) -> bool:
        return self.canonical(name) in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def entry(self, name: str) -> _Entry:
        """Shape, dtype and loader of a tensor.

        Raises:
            ModelError: if there is no such tensor.
        """
        try:
            return self._entries[self.canonical(name)]
        except KeyError:
            raise ModelError(f"The program has no parameter named {name!r}.") from None

    def get(self, name: str) -> Tensor:
        """Loads one tensor."""
        return self.entry(name).load()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self.entry(name).dtype

    def drop(self, name: str) -> None:
        """Forgets a tensor (and every tie to it)."""
        self._entries.pop(name, None)
        self._ties = {k: v for k, v in self._ties.items() if v != name and k != name}

    def copy(self) -> ParamStore:
        """A store with the same sources; adding to or dropping from one does not touch the other."""
        new = ParamStore()
        new._entries, new._ties = dict(self._entries), dict(self._ties)
        return new


@dataclass(frozen=True)
class ModelInfo:
    """What the artifact needs to know about the source model besides its graph.

    Attributes:
        name: a short name. ``source``: where it came from. ``model_type``: the config's ``model_type``.
        vocab_size: rows of the logits. ``context_length``: most positions the model takes.
        config: the config as a plain dict.
    """

    name: str
    source: str
    model_type: str
    vocab_size: int
    context_length: int
    config: dict[str, Any] = field(default_factory=dict, repr=False)


@dataclass
class Program:
    """A traced model: ``graph`` + ``params`` + ``info``.

    The graph's placeholders are the user inputs, in ``inputs`` order, and the parameters, which carry their name in
    ``node.meta["param"]``. ``node.meta["val"]`` holds the fake (shape-only) value of every node.
    """

    module: fx.GraphModule
    params: ParamStore
    info: ModelInfo
    attrs: dict[str, Any] = field(default_factory=dict)

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    @property
    def inputs(self) -> list[fx.Node]:
        """The placeholders that are not parameters."""
        return [n for n in self.graph.nodes if n.op == "placeholder" and "param" not in n.meta]

    @property
    def param_nodes(self) -> dict[str, fx.Node]:
        """Parameter name -> its placeholder."""
        return {n.meta["param"]: n for n in self.graph.nodes if n.op == "placeholder" and "param" in n.meta}

    @property
    def output(self) -> fx.Node:
        """The one value that the program returns."""
        return next(n for n in reversed(self.graph.nodes) if n.op == "output").args[0][0]  # type: ignore[index, return-value]

    @property
    def fake_mode(self) -> FakeTensorMode:
        mode = detect_fake_mode([n.meta["val"] for n in self.graph.nodes if "val" in n.meta])
        assert mode is not None
        return mode

    def input(self, name: str) -> fx.Node:
        """The user input called ``name``."""
        for node in self.inputs:
            if node.name == name:
                return node
        raise PassError(f"The program has no input named {name!r}; it has {[n.name for n in self.inputs]}.")

    def add_param(self, name: str, tensor: Tensor) -> fx.Node:
        """Adds a parameter and returns its placeholder (an existing one is replaced in the store and reused)."""
        self.params.set(name, tensor)
        return self._placeholder(name)

    def _placeholder(self, name: str) -> fx.Node:
        entry = self.params.entry(name)
        node = self.param_nodes.get(name)
        if node is None:
            with self.graph.inserting_before(next(iter(self.graph.nodes))):
                node = self.graph.placeholder("p_" + name.replace(".", "_"))
            node.meta["param"] = name
        with self.fake_mode:
            node.meta["val"] = torch.empty(entry.shape, dtype=entry.dtype, device="meta")
        return node

    def add_input(self, name: str, shape: tuple[int | torch.SymInt, ...], dtype: torch.dtype) -> fx.Node:
        """Adds a user input after the existing ones."""
        with self.graph.inserting_after(self.inputs[-1]):
            node = self.graph.placeholder(name)
        with self.fake_mode:
            node.meta["val"] = torch.empty(shape, dtype=dtype, device="meta")
        return node

    def call(self, target: Any, args: tuple, kwargs: dict | None = None, *, like: fx.Node | None = None) -> fx.Node:
        """Inserts a call at the graph's insertion point, with its fake value and ``like``'s source location."""
        node = self.graph.call_function(target, args, kwargs or {})
        as_val = lambda a: fx.node.map_arg(a, lambda n: n.meta["val"])  # noqa: E731
        # The Python dispatcher makes composite ops (linear, matmul) accept symbolic sizes.
        with self.fake_mode, enable_python_dispatcher():
            node.meta["val"] = target(*as_val(args), **as_val(kwargs or {}))
        if like is not None:
            for key in ("nn_module_stack", "stack_trace"):
                if key in like.meta:
                    node.meta[key] = like.meta[key]
        return node

    def clone(self) -> Program:
        """A program with its own graph over the same parameter sources."""
        graph = fx.Graph()
        out = graph.graph_copy(self.graph, {})
        graph.output(out)
        for old, new in zip(self.graph.nodes, graph.nodes, strict=True):
            new.meta = copy.copy(old.meta)
            new.name = old.name
        return Program(fx.GraphModule(torch.nn.Module(), graph), self.params.copy(), self.info, dict(self.attrs))

    def run(self, *inputs: Tensor, device: str | torch.device = "cpu") -> Tensor:
        """Runs the program eagerly on the reference of every op; ``inputs`` in the order of :attr:`inputs`.

        Parameters are loaded when first used and released after their last use.
        """
        from gptq_compile.passes.interpret import Interpreter

        env = dict(zip(self.inputs, inputs, strict=True))
        with torch.no_grad():
            return Interpreter(self, device).run(env, [self.output])[self.output]


def module_path(node: fx.Node) -> str:
    """Dotted path of the module whose forward made ``node``, as the user's model names it; empty if unknown."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    return path.removeprefix("model.") if path != "model" else ""


def source_line(node: fx.Node) -> str:
    """``file:line`` of the model code that made ``node``; empty if unknown."""
    lines = [s.strip() for s in (node.meta.get("stack_trace") or "").splitlines() if s.strip().startswith("File")]
    if not lines:
        return ""
    file, _, rest = lines[-1].removeprefix("File ").partition(", line ")
    return f"{file.strip(chr(34)).rsplit('/', 1)[-1]}:{rest.split(',')[0]}"


def where(node: fx.Node) -> str:
    """Words that say where in the model ``node`` comes from, for messages."""
    parts = [f"op {getattr(node.target, '__name__', node.target)} ({node.name})"]
    if path := module_path(node):
        parts.append(f"in module {path}")
    if line := source_line(node):
        parts.append(f"at {line}")
    return " ".join(parts)
