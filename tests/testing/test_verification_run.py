"""Checks in processes of their own."""

import os

import torch

from parofx.testing.verification_run import CheckResult, default_jobs, run_apart, run_checks

CPU = torch.device("cpu")


def test_results_come_in_order_whatever_the_number_of_jobs():
    names = ["reference rotate_int4_linear", "reference rotate", "reference int4_linear"]
    alone, together = (list(run_checks(CPU, 2, names=names, jobs=jobs)) for jobs in (1, 2))
    assert [result.name for result in together] == [result.name for result in alone] == names
    assert all(result.error is not None and result.failure is None for result in (*alone, *together))


def test_a_process_that_dies_fails_its_check_alone():
    assert run_apart("deadly", os._exit, 9) == CheckResult("deadly", None, "its process died with exit code 9")


def test_a_cpu_runs_one_check_at_a_time():
    assert default_jobs(CPU) == 1
