"""What a freezing compiler makes of weights, recorded as recipes while it does so.

Freezing computes new constants from weights: it multiplies BatchNorm into convolutions, transposes, packs for oneDNN.
All of it runs as ordinary operations on ordinary tensors, which a function mode sees. What is recorded is lowered to
the steps that the engine knows; the engine then makes every row of the package from the weights that were compiled,
and one that comes out with other bytes is refused. So a mistake here is an error when a model is traced, and never a
wrong weight.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from reweft.errors import UnsupportedError
from reweft.torch.lowering import Lost, Node, key_of, lower

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["Recorder", "Refused", "place_of"]

# What is asked of tensors beside their elements, and says nothing of these.
_METADATA = frozenset({
    "mkldnn::_get_mkldnn_serialized_md", "mkldnn::_nbytes", "mkldnn::data_ptr", "aten::_assert_tensor_metadata",
})  # fmt: skip
# Python functions that turn elements into Python values. Operators that give no tensor are taken for such, too.
_READS = frozenset({
    "item", "tolist", "equal", "allclose", "is_nonzero", "numpy", "any", "all", "_local_scalar_dense",
    "__bool__", "__float__", "__int__", "__index__", "__complex__", "__array__",
})  # fmt: skip
# Constants that no weight went into are part of a recipe, up to this size.
_LITERAL_NBYTES = 1 << 18


class Refused(UnsupportedError):  # noqa: N818  (callers see the class above it)
    """A frozen program that could not be refitted exactly."""


@dataclass(frozen=True)
class _Unknown:
    """Stands for a tensor of which nothing is known."""

    why: str


@dataclass
class _Seen:
    """A tensor that was made of weights, and how, as far as that was seen."""

    tensor: torch.Tensor
    """Held, so that nobody else gets its identity."""
    weights: frozenset[str]
    node: Node | None
    why: str
    """Why there is no node."""


@dataclass
class Recorder(TorchFunctionMode):
    """Sees the operations on real tensors while it is entered, and what they make of the weights.

    Other function modes that are active see what they would see without it.
    """

    weights: Mapping[str, torch.Tensor]
    """The first name of each weight, with the tensor that is compiled."""
    values_read: dict[str, str] = field(default_factory=dict)
    """Weights whose value went somewhere else than into tensors, with the operation that read it."""
    rows: dict[str, torch.Tensor] = field(default_factory=dict)
    """The constants of the final graph, by their name in it."""

    def __post_init__(self) -> None:
        super().__init__()
        self._seen: dict[int, _Seen] = {}
        named = {name: value for name, value in self.weights.items() if value.numel()}
        self._leaves = {place_of(value): Node("leaf", (name,), {}, value) for name, value in named.items()}

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation, then take note of it."""
        del types
        out = func(*args, **(kwargs or {}))
        self._note(func, args, kwargs or {}, out)
        return out

    def settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The compiler's settings with a pass behind the user's own that looks at the constants of the final graph."""
        name = "post_grad_custom_post_pass"
        theirs = settings.get(name) or getattr(torch._inductor.config, name)  # noqa: SLF001

        def both(graph: torch.fx.Graph) -> None:
            if theirs is not None:
                theirs(graph)
            for node in graph.nodes:
                if node.op == "get_attr":
                    value = operator.attrgetter(node.target)(graph.owning_module)
                    if isinstance(value, torch.Tensor):
                        self.rows[node.target] = value

        return {**settings, name: both}

    def recipes(self) -> dict[str, list[dict[str, Any]]]:
        """For each constant of the final graph that is no weight itself, the steps that make it.

        Raises:
            Refused: There are none, or a value went into the code.
        """
        for weight, what in self.values_read.items():
            raise Refused(
                f"{weight!r} cannot be refitted in a frozen program: the compiler read its value ({what})", key=weight
            )
        found = {name: self._recipe(name, value) for name, value in self.rows.items()}
        return {name: steps for name, steps in found.items() if steps is not None}

    def _recipe(self, name: str, value: torch.Tensor) -> list[dict[str, Any]] | None:
        """The steps of one constant; None for a weight that stayed itself, and for what is none.

        Raises:
            Refused: It was made of weights, and nothing says how.
        """
        node, weights = self._node(value), self._weights(value)
        if not weights and not name.startswith("_frozen_param"):
            return None
        if node is not None and node.op == "leaf" and not name.startswith("_frozen_param"):
            return None
        of = ", ".join(sorted(weights)) or "tensors that no state_dict has"
        what = f"{name!r}, which the compiler made of {of}, cannot be made again"
        if node is None:
            raise Refused(f"{what}: {self._why(value)}")
        try:
            return lower(node)
        except Lost as error:
            raise Refused(f"{what}: {error}") from error

    def _note(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        key = key_of(func)
        name = key or getattr(func, "__name__", str(func))
        if name.split(".")[0] in _METADATA or name in {"__get__", "data_ptr"}:
            return
        taken = [value for value in pytree.arg_tree_leaves(*args, **kwargs) if isinstance(value, torch.Tensor)]
        if not taken or not all(map(_is_real, taken)):
            return
        weights = frozenset[str]().union(*map(self._weights, taken))
        if not weights:
            return
        made = [value for value in pytree.tree_leaves(out) if isinstance(value, torch.Tensor)]
        if not made:
            if key or name in _READS:
                self.values_read.update(dict.fromkeys(sorted(weights), name))
            return
        if not all(map(_is_real, made)):
            # Traced and not computed: a weight met stand-ins for tensors.
            return
        node, why = self._operation(key, args, kwargs, out) if key else (None, f"{name} is no operator")
        for number, value in enumerate(made):
            if place_of(value) in self._leaves:
                continue
            one = node
            if node is not None and not isinstance(out, torch.Tensor):
                one = Node("getitem", (node, number), {}, value)
            self._seen[id(value)] = _Seen(value, weights, one, why)

    def _operation(self, key: str, args: Any, kwargs: Any, out: Any) -> tuple[Node | None, str]:
        """The operation over what is known of its tensors; None and the reason if something is not."""

        def known(value: object) -> object:
            return self._node(value) or _Unknown(self._why(value)) if isinstance(value, torch.Tensor) else value

        args, kwargs = pytree.tree_map(known, (args, kwargs))
        unknown = next((leaf for leaf in pytree.arg_tree_leaves(*args, **kwargs) if isinstance(leaf, _Unknown)), None)
        return (Node(key, tuple(args), kwargs, out), "") if unknown is None else (None, unknown.why)

    def _node(self, value: torch.Tensor) -> Node | None:
        """How a tensor is made: it is a weight, or was seen, or is a small constant."""
        if seen := self._seen.get(id(value)):
            return seen.node
        if not _is_real(value):
            return None
        if not value.is_mkldnn and (leaf := self._leaves.get(place_of(value))):
            return leaf
        if value.layout is torch.strided and value.nbytes <= _LITERAL_NBYTES:
            return Node("literal", (value.detach().clone(),), {}, value)
        return None

    def _why(self, value: torch.Tensor) -> str:
        """Why a tensor has no node."""
        if seen := self._seen.get(id(value)):
            return seen.why
        if value.layout is torch.strided and value.nbytes > _LITERAL_NBYTES:
            return f"it takes a tensor {list(value.shape)} that no state_dict has, and is large"
        return "nothing was seen that makes it"

    def _weights(self, value: torch.Tensor) -> frozenset[str]:
        """The weights that a tensor was made of."""
        if seen := self._seen.get(id(value)):
            return seen.weights
        leaf = self._leaves.get(place_of(value)) if _is_real(value) else None
        return frozenset() if leaf is None else frozenset(leaf.args)


def _is_real(value: torch.Tensor) -> bool:
    """Whether it has elements, and is not what stands for a tensor while a compiler traces."""
    kinds = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
    return type(value) in kinds and value.device.type == "cpu" and not torch._is_functional_tensor(value)  # noqa: SLF001


def place_of(value: torch.Tensor) -> tuple[Any, ...]:
    """Equal for two tensors of the same elements in the same place."""
    if value.is_mkldnn or value.layout is not torch.strided:
        return (id(value),)
    return (
        value.untyped_storage().data_ptr(), value.storage_offset(), tuple(value.shape), value.stride(), value.dtype,
    )  # fmt: skip
