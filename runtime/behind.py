"""Work behind the main thread's back."""
from concurrent.futures import ThreadPoolExecutor


class Behind:
    """A block in which pieces of work, such as writing files, are done by another thread: one at a time, in order.

    An error of a piece is raised where the next one is handed over, or at the end of the block, unless the
    block itself ends by an error.
    """

    def __enter__(self):
        self.thread, self.piece = ThreadPoolExecutor(1), None
        return self

    def __exit__(self, kind, error, traceback):
        self.thread.shutdown()
        if error is None:
            self._finish()

    def do(self, function, *args):
        """Wait for the piece before, then begin this one."""
        self._finish()
        self.piece = self.thread.submit(function, *args)

    def _finish(self):
        piece, self.piece = self.piece, None
        if piece:
            piece.result()
