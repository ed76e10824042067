"""Running out of memory, by its many names."""

from __future__ import annotations

import gc

_SIGNS = (
    "out of memory",  # CUDA, HIP, XPU, MPS
    "can't allocate memory",  # c10's CPU allocator: "DefaultCPUAllocator: can't allocate memory"
    "not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_oom_error(error: BaseException) -> bool:
    """Whether there was too little memory, of the host or of the device."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def free_memory() -> None:
    """Give back what nobody holds any more, so that the next try does not pay for the last one."""
    import torch

    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
