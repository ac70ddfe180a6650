"""Values on their way from the device, read without making it wait."""
import torch


class Later:
    """A small tensor that starts on its way to the host now, to be read later: then the host waits for what the device
    was told to do before, and not for what it was told since.
    """

    def __init__(self, tensor):
        self.value, self.arrived = tensor, None
        if tensor.is_cuda:
            self.value, self.arrived = tensor.to("cpu", non_blocking=True), torch.cuda.Event()
            self.arrived.record()

    def read(self):
        """The tensor, on the host."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.value.cpu()
