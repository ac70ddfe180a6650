"""BackgroundWriter: one task at a time, in order, on another thread."""
import threading
import time

import pytest

from common.files import BackgroundWriter


def test_tasks_run_in_order_one_at_a_time_off_the_main_thread():
    done, running = [], threading.Semaphore(1)
    def task(i):
        assert running.acquire(blocking=False)
        time.sleep(0.01)
        done.append((i, threading.current_thread() is threading.main_thread()))
        running.release()

    with BackgroundWriter() as writer:
        for i in range(5):
            writer.submit(task, i)
    assert done == [(i, False) for i in range(5)]


def test_an_error_of_a_task_is_raised_by_the_next_call_or_the_end():
    def fail():
        raise OSError("disk full")

    done = []
    with pytest.raises(OSError, match="disk full"), BackgroundWriter() as writer:
        writer.submit(fail)
        writer.submit(done.append, 1)
    with pytest.raises(OSError, match="disk full"), BackgroundWriter() as writer:
        writer.submit(fail)
    with pytest.raises(ValueError, match="of the block"), BackgroundWriter() as writer:
        writer.submit(fail)
        raise ValueError("of the block")
    assert done == []
