import torch

from parofx.testing.kernels import kernel_checks


def test_every_kernel_of_a_cpu_passes():
    checks = kernel_checks(torch.device("cpu"))
    names = [check.name for check in checks]
    assert names[:3] == ["reference rotate", "reference int4_linear", "reference rotate_int4_linear"]
    for check in checks:
        assert 0 <= check.run(5) < 1e-2
