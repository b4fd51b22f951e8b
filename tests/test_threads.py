"""The thread pool of threads.h: each rank once, barriers that order memory, callers that do not wait for each other."""

from __future__ import annotations

import os
import sys
import threading
from itertools import pairwise

import numpy as np
import pytest

from fastbert._kernels import split, team_drill

CALLS, SIZE, NESTED, MARK, LATE = range(5)


def drill(threads: int, rounds: int = 0, nested: int = 0) -> tuple[int, np.ndarray]:
    """Runs the drill, checks what holds for every team, and returns its size and log."""
    log = np.zeros((5, threads), np.int32)
    team_drill(log, rounds, nested)
    size = int(log[SIZE, 0])
    assert 1 <= size <= threads
    assert log[CALLS].tolist() == [1] * size + [0] * (threads - size)
    assert log[SIZE, :size].tolist() == [size] * size
    assert log[MARK, :size].tolist() == [rounds] * size
    assert not log[LATE].any(), "a mark of another round was seen behind a barrier"
    return size, log


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_every_rank_runs_once(threads: int) -> None:
    assert drill(threads)[0] == threads


@pytest.mark.parametrize("threads, rounds", [(1, 3), (2, 2000), (4, 200)])
def test_barriers(threads: int, rounds: int) -> None:
    assert drill(threads, rounds)[0] == threads


def test_teams_grow_and_shrink() -> None:
    for threads in (2, 5, 1, 3, 6, 2):
        assert drill(threads, rounds=5)[0] == threads


def test_a_team_inside_a_team_is_alone() -> None:
    size, log = drill(3, rounds=2, nested=3)
    assert log[NESTED, :size].tolist() == [1] * size


def test_callers_do_not_wait_for_each_other() -> None:
    """Eight callers at once: each is alone or has the whole pool, and all of them finish."""
    failures, start = [], threading.Barrier(8)

    def caller() -> None:
        start.wait()
        try:
            for _ in range(50):
                assert drill(2, rounds=5)[0] in (1, 2)
        except AssertionError as error:
            failures.append(error)

    callers = [threading.Thread(target=caller) for _ in range(8)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    assert not failures, failures[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason=f"{sys.platform} has no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_has_a_pool_of_its_own() -> None:
    drill(3, rounds=2)
    child = os.fork()
    if child == 0:
        size = 0
        try:
            size, _ = drill(3, rounds=2)
        finally:
            os._exit(size)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    assert drill(3, rounds=2)[0] == 3


def test_an_idle_pool_uses_no_cpu() -> None:
    drill(4, rounds=2)
    threading.Event().wait(0.05)  # the spin before sleep is far shorter
    before = os.times()
    threading.Event().wait(0.5)
    after = os.times()
    assert (after.user + after.system) - (before.user + before.system) <= 0.1


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("count, step", [(0, 1), (1, 1), (1, 16), (40, 1), (40, 16), (128, 6), (3071, 32)])
def test_split_covers_everything_once(size: int, count: int, step: int) -> None:
    shares = [split(rank, size, count, step) for rank in range(size)]
    assert shares[0][0] == 0
    assert shares[-1][1] == count
    assert all(end == begin for (_, end), (begin, _) in pairwise(shares))
    assert all(begin <= end and (begin % step == 0 or begin == count) for begin, end in shares)
    steps = [-(-(end - begin) // step) for begin, end in shares]
    assert max(steps) - min(steps) <= 1
