"""Stands in for PyTorch without a GPU: the calls that the sources here make, and no more."""

import contextlib

float16, float32 = "torch.float16", "torch.float32"


class cuda:
    is_available = staticmethod(lambda: False)
    is_initialized = staticmethod(lambda: False)
    device_count = staticmethod(lambda: 0)
    empty_cache = staticmethod(lambda: None)


class version:
    cuda, hip = None, None


class device:
    def __init__(self, name):
        self.type = name.split(":")[0]

    def __str__(self):
        return self.type


@contextlib.contextmanager
def no_grad():
    yield


inference_mode = no_grad


class Generator:
    def __init__(self, device="cpu"):
        self.device, self.seed = device, 0

    def manual_seed(self, seed):
        self.seed = seed
        return self
