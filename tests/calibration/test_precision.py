import pytest
import torch

from parofx.calibration.precision import product_precision

BACKENDS = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)


@pytest.mark.parametrize(("kind", "inside"), [("fast", ["bf16", "tf32"]), ("exact", ["ieee", "ieee"])])
def test_it_is_set_inside_and_put_back_behind(kind, inside):
    before = [backend.fp32_precision for backend in BACKENDS]
    with product_precision(kind):
        assert [backend.fp32_precision for backend in BACKENDS] == inside
    assert [backend.fp32_precision for backend in BACKENDS] == before


def test_exact_products_are_fp32_inside_fast_ones():
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    with product_precision("fast"), product_precision("exact"):
        error = (x @ x).double() - x.double() @ x.double()
    assert error.abs().max() < 1e-4
