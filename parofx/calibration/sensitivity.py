"""Where an error hurts: second moments of a linear's inputs, weighted by how much the model's output minds it there.

An error `δ_t` in a linear's output at position t moves the model's distribution of the next token by

    KL ≈ ½ E_t[(g_t·δ_t)²] ≈ ½ E_t[w_t Σ_n c_n δ²_tn],    w_t = |g_t|²/N,

with `g_t` the gradient there of the log-likelihood of tokens drawn from the model itself and `c_n` each channel's share
in it; what channels and positions have to do with one another is left out. With `δ = ΔW x` that is
`½ Σ_n c_n ΔW_n M ΔW_nᵀ`, `M = E[w x xᵀ]`. Gradients and inputs must meet position by position: a model's largest
activations are often where its output minds least.

An output that is no distribution over a vocabulary counts as one with normal noise of its own power.

The moments of all linears come from one backward through the float model. It is checkpointed at block borders: what
lies in memory is the values that cross them, one block's activations, the logits of one batch, and, where they are
asked for, the inputs of all linears.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from parofx.calibration.row_masks import row_mask_of, select_rows
from parofx.calibration.segment import SegmentInterpreter
from parofx.calibration.statistics import InputStatistics
from parofx.calibration.stream import BlockStream, bind_inputs
from parofx.passes.graph import FAKE_QUANTIZE, LINEAR, ROTATE
from parofx.passes.guards import why_not_served

_ASSERT_METADATA = torch.ops.aten._assert_tensor_metadata.default
#: Elements of logits that are in fp32 at a time.
SCORE_CHUNK = 1 << 24

#: Called with a linear's node, its input if that is kept, and the gradient at its output.
_Record = Callable[[Node, Tensor | None, Tensor], None]
#: The same, and the masks of its batch by name.
MaskedRecord = Callable[[Node, Tensor | None, Tensor, Mapping[str, Tensor]], None]


class Sensitivity:
    """What errors in one linear's weight cost: `½ Σ_n c_n ΔW_n M ΔW_nᵀ`.

    Args:
        out_features: N.
        in_features: K.
        group_size: channels between which M is kept.
    """

    def __init__(self, out_features: int, in_features: int, group_size: int) -> None:
        #: M, of rows weighted by the gradients behind them.
        self.moments = InputStatistics(in_features, group_size)
        self._channels = torch.zeros(out_features, dtype=torch.float64)

    def update(self, rows: Tensor, gradients: Tensor, *, where: str) -> None:
        """Add a batch: inputs `(M, K)` and the gradients `(M, N)` at the outputs."""
        squares = gradients.float().square()
        weighted = rows.float() * squares.mean(1, keepdim=True).sqrt()
        self.moments.update(weighted, where=where)
        # Per channel where the rows are large: that is where weights' errors show.
        power = rows.float().square().sum(1)
        self._channels = self._channels.to(rows.device) + (power @ squares).double()

    @property
    def channels(self) -> Tensor:
        """`c_n`: the share of each output channel, fp64 `(N,)` with mean 1."""
        mean = self._channels.mean()
        return self._channels / mean if mean > 0 else torch.ones_like(self._channels)


@dataclass
class Sensitivities:
    """What one backward tells of a graph: of its linears, and of the inputs of its transforms, both by name."""

    linears: dict[str, Sensitivity] = field(default_factory=dict)
    inputs: dict[str, InputStatistics] = field(default_factory=dict)

    def power(self, transform: str) -> Tensor | None:
        """Return `E[x²]` of a transform's input, `(K,)`; None if no row reached it."""
        found = self.inputs.get(transform)
        return None if found is None else found.power


def measure_sensitivities(
    gm: GraphModule,
    batches: Sequence[Mapping[str, Any]],
    vocabularies: frozenset[int],
    *,
    group_sizes: Mapping[str, int],
    seed: int,
) -> Sensitivities:
    """Run the float model forward and backward on every batch.

    Args:
        gm: a PREPARED graph; its transforms are taken as identities.
        batches: the model's inputs as mappings.
        vocabularies: sizes of a last dimension that make an output a distribution over tokens.
        group_sizes: by transform, the channels between which M is kept.
        seed: of the tokens and the noise that are drawn.
    """
    found = Sensitivities()

    def record(node: Node, value: Tensor | None, gradient: Tensor, masks: Mapping[str, Tensor]) -> None:
        source, weight = node.args[:2]
        assert value is not None
        assert isinstance(source, Node)
        assert isinstance(weight, Node)
        rows, gradients = select_rows(source, value, masks), select_rows(node, gradient, masks)
        name, transform = weight.meta["parofx_linear"], source.meta["parofx_transform"]
        if name not in found.linears:
            found.linears[name] = Sensitivity(gradients.shape[1], rows.shape[1], group_sizes[transform])
        found.linears[name].update(rows, gradients, where=f"the input of {name}, weighted by its gradient")
        found.inputs.setdefault(transform, InputStatistics(rows.shape[1], 1)).update(rows)

    backward_of_likelihood(gm, batches, vocabularies, record, seeds=range(seed, seed + len(batches)))
    return found


def backward_of_likelihood(
    gm: GraphModule,
    batches: Sequence[Mapping[str, Any]],
    vocabularies: frozenset[int],
    record: MaskedRecord,
    *,
    seeds: Sequence[int],
    inputs: bool = True,
) -> None:
    """Run the float model forward and, from the log-likelihood of what it predicts, backward on every batch.

    Args:
        gm: a PREPARED graph; its transforms are taken as identities.
        batches: the model's inputs as mappings.
        vocabularies: sizes of a last dimension that make an output a distribution over tokens.
        record: called with each quantized linear's node, its input, the gradient at its output, and the batch's masks.
        seeds: of the tokens and the noise that are drawn for each batch.
        inputs: whether to keep every linear's input for its gradient, from the forward on; None is recorded if not.
    """
    stream = BlockStream(gm, batches)
    for border, masks, seed in zip(stream.borders, stream.masks, seeds, strict=True):
        generator = torch.Generator().manual_seed(seed)

        def recorded(node: Node, value: Tensor | None, gradient: Tensor, masks: Mapping[str, Tensor] = masks) -> None:
            record(node, value, gradient, masks)

        with torch.enable_grad():
            outputs = _Checkpointed(stream.split, recorded, inputs).run(*border.values())
            leaves = zip(output_nodes(gm), pytree.tree_leaves(outputs), strict=True)
            trained = [(node, leaf) for node, leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
            logits = [(node, leaf) for node, leaf in trained if leaf.shape[-1] in vocabularies]
            score = _token_score if logits else _normal_score
            chosen = logits or trained
            if chosen:
                scores = [unmasked(node, score(leaf.detach(), generator), masks) for node, leaf in chosen]
                torch.autograd.backward([leaf for _, leaf in chosen], scores)


def first_sequences(
    gm: GraphModule, batches: Sequence[Mapping[str, Any]], count: int, *, at_a_time: int = 1
) -> list[Mapping[str, Any]]:
    """Return the first `count` sequences, so many of them to a batch where the captured graph serves such."""
    found: list[Mapping[str, Any]] = []
    for batch in batches:
        size = count_sequences(batch)
        end = min(size, count)
        parts = [
            {name: _rows(value, slice(first, min(first + at_a_time, end)), size) for name, value in batch.items()}
            for first in range(0, end, at_a_time)
        ]
        served = parts and all(why_not_served(gm, bind_inputs(gm, part)) is None for part in (parts[0], parts[-1]))
        found += parts if served else [batch]
        count -= end if served else size
        if count <= 0:
            break
    return found


def count_sequences(batch: Mapping[str, Any]) -> int:
    """Return how many sequences a batch holds."""
    # Vectors may hold something of each position instead.
    return max((len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim() > 1), default=1)


def _rows(value: Any, rows: slice, size: int) -> Any:
    alike = isinstance(value, Tensor) and value.dim() > 0 and len(value) == size
    return value[rows] if alike else value


def output_nodes(gm: GraphModule) -> list[Any]:
    """Return what a graph returns, leaf by leaf: nodes, or constants."""
    return pytree.tree_leaves(gm.graph.output_node().args[0])


def unmasked(node: Node, score: Tensor, masks: Mapping[str, Tensor]) -> Tensor:
    """Return a score of a node's value, with zeros in the rows that its mask leaves out."""
    mask = row_mask_of(node)
    return score if mask is None else score * mask.counting(score, masks)[..., None]


def _token_score(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Return the gradient of `log p(token)` at the logits, for one token drawn from each row's distribution."""
    score = torch.empty_like(logits, memory_format=torch.contiguous_format)
    rows, scores = logits.reshape(-1, logits.shape[-1]), score.view(-1, logits.shape[-1])
    step = max(1, SCORE_CHUNK // rows.shape[1])
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        probabilities = rows[part].float().softmax(-1)
        cumulative = probabilities.cumsum(-1)
        drawn = torch.rand(len(cumulative), 1, generator=generator).to(logits.device) * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, drawn).clamp(max=rows.shape[1] - 1)
        # Where a token is all but certain, what is left of 1 − p is far below a 16-bit number's last digit.
        scores[part] = probabilities.neg_().scatter_add_(1, token, torch.ones_like(token, dtype=torch.float32))
    return score


def _normal_score(output: Tensor, generator: torch.Generator) -> Tensor:
    """Return the gradient of a normal log-likelihood at `output`: noise over its own standard deviation."""
    power = output.float().square().mean().clamp(min=torch.finfo(torch.float32).tiny)
    noise = torch.randn(output.shape, generator=generator).to(output.device)
    return (noise / power.sqrt()).to(output.dtype)


class _Checkpointed(Interpreter):
    """Runs a graph of segments; each is run again when the backward comes to it."""

    def __init__(self, split: GraphModule, record: _Record, inputs: bool) -> None:
        super().__init__(split)
        self.extra_traceback = False
        self._record = record
        self._inputs = inputs

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a segment."""
        segment = _Probed(self.fetch_attr(target), self._record, self._inputs)
        return checkpoint(segment.run, *args, use_reentrant=False, preserve_rng_state=False, determinism_check="none")


class _Probed(SegmentInterpreter):
    """Runs a segment with transforms as identities; reports the input and the output's gradient of its linears."""

    def __init__(self, module: GraphModule, record: _Record, inputs: bool) -> None:
        super().__init__(module)
        self._record = record
        self._inputs = inputs

    def run_node(self, n: Node) -> Any:
        """Run one node."""
        if n.target is _ASSERT_METADATA:
            return None  # the export noted the dtypes of a forward without autocast
        if n.target is ROTATE or n.target is FAKE_QUANTIZE:
            return self.env[n.args[0]]  # type: ignore[index]
        value = super().run_node(n)
        weight = n.args[1] if n.target is LINEAR else None
        if not isinstance(weight, Node) or weight.target is not FAKE_QUANTIZE:
            return value
        if not value.requires_grad:  # neither weights nor tokens do
            value = value.detach().requires_grad_()
        source = self.env[n.args[0]].detach() if self._inputs else None  # type: ignore[index]
        value.register_hook(partial(self._record, n, source))
        return value
