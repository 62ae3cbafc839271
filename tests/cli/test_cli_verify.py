"""`parofx verify` and `parofx tune`."""

import json

import pytest
import torch

from parofx.testing import kernels


def test_verify_reports_the_worst_error_of_each_kernel(run, tmp_path):
    report = tmp_path / "report.json"
    status, output, _ = run("verify", "--device", "cpu", "--examples", 3, "-k", "reference", "--json", report)
    assert status == 0, output
    assert output.count("passed") == 3
    written = json.loads(report.read_text())
    assert set(written["errors"]) == {
        "reference rotate", "reference int4_linear", "reference rotate_int4_linear"
    }  # fmt: skip
    assert written["failures"] == {}


def test_verify_fails_where_a_kernel_does(run, monkeypatch):
    def wrong(examples):
        raise AssertionError(f"wrong in {examples} cases")

    checks = [kernels.KernelCheck("good", lambda examples: 0.0), kernels.KernelCheck("bad", wrong)]
    monkeypatch.setattr(kernels, "kernel_checks", lambda device: checks)
    status, output, _ = run("verify", "--device", "cpu", "--examples", 7)
    assert status == 1
    assert "wrong in 7 cases" in output
    assert "1 of 2 kernels failed" in output


def test_checks_run_in_processes_of_their_own(run):
    status, output, _ = run("verify", "--device", "cpu", "--examples", 2, "-k", "reference", "-j", 2)
    assert status == 0, output
    assert output.count("passed") == 3


def test_verify_refuses_a_name_that_no_kernel_has(run):
    status, output, _ = run("verify", "--device", "cpu", "-k", "no such kernel")
    assert status == 2
    message = "-k: no kernel of cpu has 'no such kernel' in its name; there are ['reference rotate', "
    assert message in " ".join(output.split())


def test_tune_reads_shapes(run):
    for shape, message in (("4096", "a layer must be written KxN"), ("100x8", "K must be a multiple of 128")):
        status, output, _ = run("tune", shape)
        assert status == 2
        assert message in output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune")
def test_tune_needs_a_gpu(run):
    pytest.importorskip("triton")
    status, output, _ = run("tune", "128x8", "-m", 1)
    assert status == 2
    assert "tuning needs a CUDA device" in output
