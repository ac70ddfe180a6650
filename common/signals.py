"""Signals: graceful stops (Slurm, spot instances, shutdown of a cluster) and the deferral of other handlers."""
import contextlib
import multiprocessing
import os
import signal
import threading

# Ends of jobs by schedulers (TERM, USR1, USR2), of a terminal (HUP, BREAK) and of CPU time; no platform has them all.
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGXCPU",
                                                        "SIGBREAK") if hasattr(signal, name))


class StopSignals:
    """Context in which the stop signals only set `received` to the name of the first one that arrived.

    Those that are ignored, as SIGHUP under nohup, stay so. Outside the main thread no signal can be received.
    """

    def __enter__(self):
        self.received = None
        is_main = threading.current_thread() is threading.main_thread()
        self.previous_handlers = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS
                                  if is_main and signal.getsignal(number) is not signal.SIG_IGN}
        return self

    def _handle(self, number, frame):
        self.received = self.received or signal.Signals(number).name

    def __exit__(self, *error):
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)


class DeferredSignalHandler:
    """Handler of a signal that acts only inside `with` blocks, where an exception from it does no harm.

    On entry the wrapped handler is called once, for signals that arrived before; it must find out itself whether
    there were any.
    """

    @classmethod
    def install(cls, name):
        """Wrap the handler of a signal, such as "SIGCHLD", unless it is wrapped or missing, and return the context."""
        if not hasattr(signal, name):
            return contextlib.nullcontext()
        number = getattr(signal, name)
        handler = signal.getsignal(number)
        if not isinstance(handler, cls):
            handler = cls(number, handler)
            signal.signal(number, handler)
        return handler

    def __init__(self, number, handler):
        self.number, self.handler, self.is_open = number, handler, False

    def __call__(self, number, frame):
        """Call the wrapped handler, if inside a block."""
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
    """Ignore stop signals in a data-loading worker, except those from its parent, which still needs its data."""
    if not (hasattr(signal, "sigwaitinfo") and hasattr(signal, "pthread_sigmask")):  # as on macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    parent = multiprocessing.parent_process().pid  # with a fork server, os.getppid() is another process

    def exit_on_parents_signal():
        while signal.sigwaitinfo(STOP_SIGNALS).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=exit_on_parents_signal, daemon=True).start()
