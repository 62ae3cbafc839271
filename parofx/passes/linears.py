"""Which linears a graph holds, which of them can be quantized, and which share a transform."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch.fx import GraphModule, Node

from parofx.config import FALLBACK_GROUP_SIZES, SMALLEST_GROUP_SIZE, ParoConfig
from parofx.packing import COLUMNS_PER_RUN
from parofx.passes.blocks import block_of
from parofx.passes.graph import (
    EMBEDDING,
    LINEAR,
    STAYS_FLOAT,
    Binding,
    binding,
    module_stack,
    nodes_calling,
    operator_name,
    parameter_node,
    weight_binding,
)
from parofx.passes.whole_modules import is_module
from parofx.report import FloatReason

aten = torch.ops.aten
#: What a router does between its linear and the choice of experts.
_ROUTER_PATH = frozenset(
    {
        "softmax", "_softmax", "sigmoid", "to", "_to_copy", "view", "reshape", "float", "add", "mul", "div", "sub",
        "masked_fill", "type_as",
    }
)  # fmt: skip
#: Products that may take slices of a stack of matrices.
_BATCHED_PRODUCTS = ("mm", "matmul", "linear", "einsum")


@dataclass
class LinearUnit:
    """One weight matrix and every call that reads it; tied weights are one unit.

    A tensor that is read as it is and transposed is two matrices, of which the second has a `suffix` to its name. An
    output head that is to be quantized is known by its own `module`, though an embedding may own the weight. `bits` is
    the width of its codes, once that is decided; `bits_given` says that `lm_head` gave it.
    """

    weight: Binding
    transposed: bool
    calls: list[Node] = field(default_factory=list)
    suffix: str = ""
    module: str | None = None
    bits: int = 4
    bits_given: bool = False

    @property
    def name(self) -> str:
        """The module that owns the weight, or the weight itself where it is no module's `weight`."""
        if self.module is not None:
            return self.module + self.suffix
        module, _, attribute = self.weight.fqn.rpartition(".")
        return (module if attribute == "weight" and module else self.weight.fqn) + self.suffix

    @property
    def stays_float(self) -> FloatReason | None:
        """Why it stays float whatever the graph says of it, or None."""
        weight = self.calls[0].args[1]
        assert isinstance(weight, Node)
        return parameter_node(weight).meta.get(STAYS_FLOAT)

    @property
    def in_features(self) -> int:
        """K."""
        return self.weight.tensor.shape[0 if self.transposed else 1]

    @property
    def out_features(self) -> int:
        """N."""
        return self.weight.tensor.shape[1 if self.transposed else 0]

    @property
    def bias(self) -> Binding | None:
        """The bias parameter of the first call, if it has one."""
        args = self.calls[0].args
        return binding(args[2]) if len(args) > 2 else None


def find_units(gm: GraphModule) -> list[LinearUnit]:
    """Return the graph's linears with a parameter weight, in order of their first call."""
    units: dict[tuple[int, bool], LinearUnit] = {}
    for node in nodes_calling(gm.graph, LINEAR):
        found = weight_binding(node.args[1])
        if found is None:
            continue
        bound, transposed = found
        unit = units.get((id(bound.tensor), transposed))
        if unit is None:
            unit = LinearUnit(bound, transposed)
            if (id(bound.tensor), not transposed) in units:
                unit.suffix = ".transposed"
            # Dynamo may compile two models at once, whose parameters have the same names.
            while any(unit.name == other.name for other in units.values()):
                unit.suffix += "_"
            units[id(bound.tensor), transposed] = unit
        unit.calls.append(node)
    return list(units.values())


def find_weight_stacks(gm: GraphModule) -> list[str]:
    """Return the names of parameters with three or more dimensions that matrix products read slices of."""
    names: dict[str, None] = {}
    for node in gm.graph.nodes:
        bound = binding(node)
        if bound is None or bound.tensor.dim() < 3:
            continue
        pending, seen = list(node.users), {node}
        while pending:
            user = pending.pop()
            if user in seen:
                continue
            seen.add(user)
            name = operator_name(user)
            if any(product in name for product in _BATCHED_PRODUCTS):
                names[bound.fqn] = None
            elif name in ("transpose", "select", "index", "getitem", "permute", "t", "slice", "to", "unbind"):
                pending += user.users
    return list(names)


def find_attention_weights(gm: GraphModule) -> list[str]:
    """Return the names of matrices that one opaque attention call reads; Dynamo does not look inside it."""
    calls = nodes_calling(gm.graph, torch.nn.functional.multi_head_attention_forward)
    bound = [binding(argument) for call in calls for argument in call.all_input_nodes]
    units = [LinearUnit(one, transposed=False) for one in bound if one is not None and one.tensor.dim() == 2]
    return list(dict.fromkeys(unit.name for unit in units))


@dataclass(frozen=True)
class Selection:
    """Decides which units stay float; pure, so that its answer can be asked before anything changes.

    `replace_modules` is set where the result goes back into a module tree: then a weight must belong to a module that
    is nothing but its linear.
    """

    config: ParoConfig
    blocks: tuple[str, ...]
    embeddings: tuple[torch.Tensor, ...]
    output_heads: tuple[str, ...] = ()
    replace_modules: bool = False

    def why_not(self, unit: LinearUnit) -> tuple[FloatReason, str] | None:
        """Return why a unit stays float, apart from its K, or None."""
        pattern = next((one for one in self.config.modules_to_not_convert if matches(unit.name, one)), None)
        if pattern is not None:
            return FloatReason.EXCLUDED, f"matches {pattern!r}"
        if unit.stays_float is FloatReason.LEFT_FLOAT:
            return FloatReason.LEFT_FLOAT, ""
        if self.config.lm_head == "float" and self._is_output_head(unit):
            return FloatReason.OUTPUT_HEAD, ""
        if any(_selects_experts(call) for call in unit.calls):
            return FloatReason.ROUTER, ""
        columns = COLUMNS_PER_RUN[self.bits(unit)]
        if unit.out_features % columns:
            detail = f"{unit.out_features} out_features; {self.bits(unit)} bits need a multiple of {columns}"
            return FloatReason.OUT_FEATURES, detail
        if self.replace_modules and is_module(unit.weight, "", unit.calls):
            return FloatReason.WHOLE_MODEL, ""
        if self.replace_modules and not is_module(unit.weight, unit.name, unit.calls, tied=unit.module is not None):
            return FloatReason.FUNCTIONAL, f"{unit.weight.fqn} is read outside of one linear module"
        return None

    def bits(self, unit: LinearUnit) -> int:
        """Return the width of a unit's codes."""
        return self._head_bits(unit) or self.config.bits

    def bits_given(self, unit: LinearUnit) -> bool:
        """Return whether a unit's width is `lm_head`'s."""
        return self._head_bits(unit) is not None

    def _head_bits(self, unit: LinearUnit) -> int | None:
        head = self.config.lm_head
        return head if head != "float" and self._is_output_head(unit) else None

    def _is_output_head(self, unit: LinearUnit) -> bool:
        if unit.name in self.output_heads or unit.stays_float is FloatReason.OUTPUT_HEAD:
            return True
        if any(block_of(call, self.blocks) for call in unit.calls):
            return False
        weight = unit.weight.tensor
        if any(weight is table for table in self.embeddings):
            return True
        alike = any(weight.shape == table.shape for table in self.embeddings)
        return alike and not any(map(_feeds_weights, unit.calls))


def name_tied_heads(units: Iterable[LinearUnit], embeddings: Iterable[torch.Tensor]) -> None:
    """Name each unit that reads an embedding table after the module of its calls."""
    tables = list(embeddings)
    for unit in units:
        if any(unit.weight.tensor is table for table in tables):
            modules = {stack[-1][0] for call in unit.calls if (stack := module_stack(call))}
            if len(modules) == 1 and modules != {""}:
                unit.module = modules.pop()


def find_embeddings(gm: GraphModule) -> tuple[torch.Tensor, ...]:
    """Return the embedding tables that the graph looks up."""
    lookups = nodes_calling(gm.graph, *EMBEDDING)
    bound = [binding(argument) for node in lookups for argument in node.args[:2]]
    return tuple(one.tensor for one in bound if one is not None and one.tensor.dim() == 2)


def choose_group_sizes(units: Iterable[LinearUnit], config: ParoConfig) -> dict[str, int]:
    """Return unit name → group size; units whose K no group size divides are left out.

    One size serves all: the largest of `(config.group_size, 64, 32)` that divides every K which 32 divides. With
    `mixed_group_size` each unit takes the largest that divides its own.
    """
    candidates = [config.group_size, *(size for size in FALLBACK_GROUP_SIZES if size < config.group_size)]
    features = {unit.name: unit.in_features for unit in units if unit.in_features % SMALLEST_GROUP_SIZE == 0}
    if config.mixed_group_size:
        return {name: next(size for size in candidates if k % size == 0) for name, k in features.items()}
    common = next(size for size in candidates if all(k % size == 0 for k in features.values()))
    return dict.fromkeys(features, common)


def group_siblings(units: list[LinearUnit], blocks: tuple[str, ...], *, share: bool) -> list[list[LinearUnit]]:
    """Partition units into sets that share one transform.

    Units are siblings if, in one block, a call of each reads the same tensor. Being siblings is transitive. A transform
    is fitted for codes of one width.
    """
    if not share:
        return [[unit] for unit in units]
    owner: dict[tuple[Node, str, int], int] = {}
    parent = list(range(len(units)))

    def root(index: int) -> int:
        while parent[index] != index:
            index = parent[index]
        return index

    for index, unit in enumerate(units):
        for call in unit.calls:
            source = call.args[0]
            assert isinstance(source, Node)
            first = owner.setdefault((source, block_of(call, blocks), unit.bits), index)
            one, other = sorted((root(first), root(index)))
            parent[other] = one
    groups: dict[int, list[LinearUnit]] = {}
    for index, unit in enumerate(units):
        groups.setdefault(root(index), []).append(unit)
    return list(groups.values())


def matches(name: str, pattern: str) -> bool:
    """Say whether a module name is meant: equal, a glob match, or a run of whole components (`"lm_head"`)."""
    return fnmatch.fnmatchcase(name, pattern) or f".{pattern}." in f".{name}."


def _feeds_weights(call: Node) -> bool:
    """Say whether what a linear gives reaches a product with another weight: then it is no output of the model."""
    pending, seen = list(call.users), set()
    while pending:
        user = pending.pop()
        if user in seen:
            continue
        seen.add(user)
        if any(_is_matrix(source) for source in user.all_input_nodes):
            return True
        pending += user.users
    return False


def _is_matrix(node: Node) -> bool:
    found = weight_binding(node)
    return found is not None and found[0].tensor.dim() > 1 and found[0].tensor.is_floating_point()


def _selects_experts(call: Node) -> bool:
    pending, seen = list(call.users), set()
    while pending:
        user = pending.pop()
        name = operator_name(user)
        if name == "topk" or (name == "argmax" and any(reader.op != "output" for reader in user.users)):
            return True
        if name in _ROUTER_PATH and user not in seen:
            seen.add(user)
            pending += user.users
    return False
