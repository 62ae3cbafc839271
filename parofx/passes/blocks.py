"""Blocks: the repeated modules of a model, found from the graph.

A block is one of several sibling modules of one class that contain linears, whatever they are called:
`nn_module_stack` says which module each node was traced in. Of nested repetitions the outermost counts, unless it
is itself nothing but repetitions (an encoder and a decoder of one class). A graph without such modules is one block.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.split_module import split_module

from parofx.passes.graph import INT4_LINEAR, LINEAR, module_stack, nodes_calling

#: Name of the single block of a graph without repeated modules.
WHOLE_GRAPH = ""


def find_blocks(gm: GraphModule) -> tuple[str, ...]:
    """Return the paths of the block modules in the order they are first run; empty if there are none."""
    members: dict[tuple[str, str], list[str]] = defaultdict(list)
    linears = []
    for node in nodes_calling(gm.graph, LINEAR, INT4_LINEAR):
        stack = module_stack(node)
        linears.append(stack[-1][0] if stack else WHOLE_GRAPH)
        # The innermost module may be the linear itself: a list of linears is no list of blocks.
        for path, kind in stack[:-1]:
            siblings = members[path.rpartition(".")[0], kind]
            if path and path not in siblings:
                siblings.append(path)
    repeated = {path for paths in members.values() if len(paths) > 1 for path in paths}
    blocks = [block for path in _outermost(repeated) for block in _refine(path, repeated, linears)]
    first_run = {path: index for index, path in reversed(list(enumerate(_paths_in_order(gm))))}
    return tuple(sorted(blocks, key=lambda path: first_run[path]))


def _refine(path: str, repeated: set[str], linears: list[str]) -> list[str]:
    """Return the blocks a repeated module stands for: itself, or those inside it if they hold all its linears."""
    inside = _outermost({other for other in repeated if _within(other, path) and other != path})
    own = [linear for linear in linears if _within(linear, path)]
    if inside and all(any(_within(linear, other) for other in inside) for linear in own):
        return [block for other in inside for block in _refine(other, repeated, linears)]
    return [path]


def _outermost(paths: set[str]) -> list[str]:
    return [path for path in paths if not any(_within(path, other) and path != other for other in paths)]


def _within(path: str, module: str) -> bool:
    return path == module or path.startswith(module + ".")


def block_of(node: Node, blocks: tuple[str, ...]) -> str:
    """Return the block a node was traced in, or `WHOLE_GRAPH` if it is outside of all."""
    paths = {path for path, _ in module_stack(node)}
    return next((block for block in blocks if block in paths), WHOLE_GRAPH)


def split_at_blocks(gm: GraphModule, blocks: tuple[str, ...]) -> GraphModule:
    """Return a graph of sub-graphs, cut wherever execution enters another block; it computes the same.

    Nodes between two blocks stay with the one before; those behind the last one, an output head that is far wider than
    any block, make a graph of their own. Sub-graphs share the tensors of `gm`.
    """
    part = 0
    current: str | None = None
    partition: dict[Node, int] = {}
    computed = [node for node in gm.graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    last = next((node for node in reversed(computed) if block_of(node, blocks) != WHOLE_GRAPH), None)
    for node in computed:
        block = block_of(node, blocks)
        if block != WHOLE_GRAPH and block != current:
            part += current is not None or bool(partition)
            current = block
        partition[node] = part
        part += node is last
    root = torch.nn.Module()
    root.__dict__.update(gm.__dict__)
    return split_module(gm, root, lambda node: partition[node], keep_original_order=True)


def _paths_in_order(gm: GraphModule) -> list[str]:
    return [path for node in gm.graph.nodes for path, _ in module_stack(node)]
