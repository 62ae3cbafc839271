"""The graph tells whose outputs are normalized before they are added to anything."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO

import parofx
from parofx.calibration.normalized import counts_relative, mark_normalized
from parofx.passes.transforms import find_transforms

SIZE = 64


class Sublayers(nn.Module):
    """An attention-like and a gated sublayer; `post` norms their outputs, `inner` the first projection's."""

    def __init__(self, *, post: bool, inner: bool, norm: type[nn.Module] = nn.RMSNorm) -> None:
        super().__init__()
        self.q, self.v, self.o = (nn.Linear(SIZE, SIZE, bias=False) for _ in range(3))
        self.gate, self.up, self.down = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)
        self.norms = nn.ModuleList(norm(SIZE) for _ in range(5))
        self.post, self.inner = post, inner

    def forward(self, x: Tensor) -> Tensor:
        h = self.norms[0](x)
        q = self.norms[1](self.q(h)) if self.inner else self.q(h)
        rotated = q * 0.6 + torch.cat([-q[..., SIZE // 2 :], q[..., : SIZE // 2]], -1) * 0.8
        y = self.o(torch.nn.functional.scaled_dot_product_attention(rotated, q, self.v(h)))
        x = x + (self.norms[2](y) if self.post else y)
        h = self.norms[3](x)
        y = self.down(torch.nn.functional.silu(self.gate(h)) * self.up(h))
        return x + (self.norms[4](y) if self.post else y)


class WrittenOut(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return self.weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class ByProduct(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x / ((x * x).mean(-1, keepdim=True) + 1e-6).sqrt())


class SquaredRelu(nn.Module):
    """An activation function that squares, in front of a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.relu(self.up(x)).square())


class OneLinear(nn.Module):
    """A linear whose output a function joins with its input."""

    def __init__(self, join: Callable[[Tensor, Tensor, nn.Module], Tensor]) -> None:
        super().__init__()
        self.linear, self.norm, self.join = nn.Linear(SIZE, SIZE), nn.RMSNorm(SIZE), join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(x, self.linear(x), self.norm)


def attended(x: Tensor, y: Tensor, norm: nn.Module) -> Tensor:
    mask = torch.zeros(y.shape[1], x.shape[1]).masked_fill(torch.ones(y.shape[1], x.shape[1]).triu(1).bool(), -1e9)
    return x + norm(torch.softmax(y @ x.mT + mask, -1) @ x)


def relative(model: nn.Module, *inputs: object, **config: object) -> set[str]:
    gm = parofx.prepare(parofx.capture(model.eval(), *inputs), parofx.ParoConfig(group_size=32, **config))
    transforms = find_transforms(gm)
    mark_normalized(gm, transforms)
    return {linear.name for one in transforms if counts_relative(one) for linear in one.linears}


@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm, WrittenOut, ByProduct])
@pytest.mark.parametrize("share", [True, False])
def test_what_meets_a_norm_before_a_sum(norm: type[nn.Module], share: bool) -> None:
    def found(**options: bool) -> set[str]:
        return relative(Sublayers(norm=norm, **options), torch.randn(2, 5, SIZE), share_siblings=share)

    everything = {"q", "v", "o", "gate", "up", "down"}
    assert found(post=True, inner=False) == found(post=True, inner=True) == everything
    assert found(post=False, inner=False) == set()
    # Queries are, values are not; siblings count alike.
    assert found(post=False, inner=True) == (set() if share else {"q"})


@pytest.mark.parametrize(
    "join",
    [
        lambda x, y, norm: x + y * norm(y).sigmoid().mean() + 0 * norm(y),
        lambda x, y, norm: x + (y + norm(y)),
        lambda x, y, norm: norm(torch.addcmul(x, y, norm.weight)),
        lambda x, y, norm: norm(y.add_(x)),
        lambda x, y, norm: x + y.relu().square().sum(1, keepdim=True),
        lambda x, y, norm: x + y.square().mean(-1, keepdim=True),
    ],
    ids=["norm aside", "both", "scaled sum", "in place", "over tokens", "size alone"],
)
def test_what_joins_a_sum_as_it_is(join: Callable[..., Tensor]) -> None:
    assert relative(OneLinear(join), torch.randn(2, 5, SIZE)) == set()


@pytest.mark.parametrize(
    "join",
    [
        attended,
        lambda x, y, norm: x + nn.functional.normalize(y, dim=-1),
        lambda x, y, norm: x + (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True) + 1e-5).sqrt(),
    ],
    ids=["mask", "length", "variance"],
)
def test_what_is_over_its_size_before_a_sum(join: Callable[..., Tensor]) -> None:
    assert relative(OneLinear(join), torch.randn(2, 5, SIZE)) == {"linear"}


def test_squares_alone_are_no_norm() -> None:
    assert relative(SquaredRelu(), torch.randn(2, 5, SIZE)) == set()


def test_models_with_norms_in_front_of_sums_only_are_relative() -> None:
    for name, expected in (("llama", 0), ("gemma3", 1)):
        model = ZOO[name].build()
        names = relative(model, ZOO[name].inputs())
        linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
        assert names == (linears if expected else set()), name
