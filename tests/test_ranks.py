"""The helper that runs tests on several processes says what happened on them."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from ranks import cases_on_ranks, on_ranks


def a_sum(factor):
    t = torch.ones(2) * factor * (dist.get_rank() + 1)
    dist.all_reduce(t)
    return t


def some_case(name):
    if name == "raises on one rank" and dist.get_rank() == 1:
        raise ValueError("rank 1 has something to say")
    if name == "ends" and dist.get_rank() == 1:
        os._exit(7)
    if name == "hangs":
        time.sleep(60)
    return float(a_sum(2.0)[0])


@pytest.mark.slow
@pytest.mark.slow
def test_results_come_by_rank():
    assert [t.tolist() for t in on_ranks(2, a_sum, 3.0)] == [[9.0, 9.0]] * 2


def test_a_case_that_raises_is_told_and_the_others_run():
    with pytest.raises(
        AssertionError,
        match="raises on one rank, rank 1 of 2(.|\n)*ValueError: rank 1 has something to say",
    ) as caught:
        cases_on_ranks(2, some_case, ["first", "raises on one rank", "last"])
    assert "--- first" not in str(caught.value) and "--- last" not in str(caught.value)


@pytest.mark.slow
def test_ends_and_hangs_are_told():
    with pytest.raises(AssertionError, match="rank 1 of 2 ended with 7"):
        cases_on_ranks(2, some_case, ["ends"])
    with pytest.raises(
        AssertionError, match=r"no word in 20 s from rank 0 in call 1|ended with 1 in \('hangs',\)"
    ):
        cases_on_ranks(2, some_case, ["first", "hangs"], timeout=20)


@pytest.mark.slow
@pytest.mark.slow
def test_the_first_exception_is_raised():
    with pytest.raises(ValueError, match="rank 1 has something"):
        on_ranks(2, some_case, "raises on one rank")
