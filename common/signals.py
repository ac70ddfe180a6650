"""Being told to stop: the signals of Slurm, of spot instances, of a cluster that shuts down."""

import multiprocessing
import os
import signal
import threading

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Within this context SIGTERM and SIGUSR1 only set a flag, `received`: the name of the first that came."""

    def __enter__(self):
        self.received = None
        self.before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def _note(self, number, frame):
        self.received = self.received or signal.Signals(number).name

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


class DeferredSignalHandler:
    """A signal's handler that is called within `with` blocks alone: where an exception from it does no harm.

    What came before a block is answered at its beginning. For handlers that look for what happened themselves.
    """

    @classmethod
    def of(cls, number):
        """Postpone the handler that this signal has now, unless it is postponed already."""
        handler = signal.getsignal(number)
        if not isinstance(handler, cls):
            handler = cls(number, handler)
            signal.signal(number, handler)
        return handler

    def __init__(self, number, handler):
        self.number, self.handler, self.is_open = number, handler, False

    def __call__(self, number, frame):
        if self.is_open and callable(self.handler):
            self.handler(number, frame)

    def __enter__(self):
        self.is_open = True
        try:
            self(self.number, None)
        except BaseException:
            self.is_open = False
            raise

    def __exit__(self, *error):
        self.is_open = False


def ignore_stop_signals_in_worker(worker):
    """For a worker that loads data: a signal to the whole group is its master's business, who still needs its data.

    What the master itself sends ends the worker.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS: who sent a signal cannot be told there
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    master = multiprocessing.parent_process().pid  # with a fork server, not the process that forked this one

    def listen():
        while signal.sigwaitinfo(STOP_SIGNALS).si_pid != master:
            pass
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
