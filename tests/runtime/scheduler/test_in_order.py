"""Tasks on several threads give their results in order, none of them far ahead of the reader."""

import threading
import time

import pytest

from tilewright.runtime.scheduler import in_order


class Tasks:
    """Tasks that return their number; how many have started."""

    def __init__(self, count, seconds=lambda i: 0.0):
        self.started, self.lock = 0, threading.Lock()
        self.list = [lambda i=i: self.go(i, seconds(i)) for i in range(count)]

    def go(self, i, seconds):
        with self.lock:
            self.started += 1
        time.sleep(seconds)
        return i


@pytest.mark.parametrize("workers", [1, 2, 4, 16])
def test_results_come_in_the_order_of_their_tasks(workers):
    tasks = Tasks(30, lambda i: 0.004 * (i % 3 == 0))  # every third is slow
    assert list(in_order(tasks.list, workers)) == list(range(30))
    assert tasks.started == 30


def test_no_task_gives_no_result():
    assert list(in_order([], 2)) == []


@pytest.mark.parametrize("workers", [1, 3])
def test_no_more_than_two_results_a_worker_wait_for_a_slow_reader(workers):
    tasks, read = Tasks(40), 0
    for _ in in_order(tasks.list, workers):
        read += 1
        time.sleep(0.002)
        assert tasks.started - read <= 2 * workers
    assert read == 40


def test_results_are_ready_before_a_slow_reader_asks():
    tasks = Tasks(10)
    results = in_order(tasks.list, 2)
    next(results)
    deadline = time.monotonic() + 10
    while tasks.started < 5 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert tasks.started == 5
    results.close()


def test_tasks_that_wait_are_dropped_when_the_reader_leaves():
    tasks = Tasks(40, lambda i: 0.2 * (i == 1))
    results = in_order(tasks.list, 1)
    assert next(results) == 0
    results.close()
    assert tasks.started <= 2  # the second ran already


def test_a_fault_comes_in_its_turn_and_drops_the_tasks_that_wait():
    tasks = Tasks(40, lambda i: 0.002)

    def fail():
        raise KeyError("third")

    tasks.list[2] = fail
    results = in_order(tasks.list, 1)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(KeyError, match="third"):
        next(results)
    assert tasks.started <= 2 + 2
    with pytest.raises(StopIteration):
        next(results)
