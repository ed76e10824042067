"""Memory: what a model takes, giving it back, and data on its way between devices."""

from __future__ import annotations

import gc
import io
from typing import TYPE_CHECKING, Any

from trainyard.data.batches import to_device as move_data_to_device

if TYPE_CHECKING:
    import torch


def garbage_collection_cuda() -> None:
    """Collect garbage, and give unused memory of the GPU back to it."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        try:
            torch.cuda.empty_cache()
        except RuntimeError as error:
            if not is_oom_error(error):
                raise


def is_oom_error(error: BaseException) -> bool:
    """Whether a GPU, cuDNN or the machine ran out of memory."""
    import torch

    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        said in text
        for said in (
            "out of memory",
            "CUDNN_STATUS_NOT_SUPPORTED",
            "can't allocate memory",
            "CUBLAS_STATUS_ALLOC_FAILED",
        )
    )


def get_model_size_mb(model: torch.nn.Module) -> float:
    """Of its state_dict as torch.save writes it, in units of 10**6 bytes."""
    import torch

    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.tell() / 1e6


def recursive_detach(in_dict: Any, to_cpu: bool = False) -> Any:
    """A copy of dicts of tensors without their graph."""
    import torch

    if isinstance(in_dict, dict):
        return {key: recursive_detach(value, to_cpu) for key, value in in_dict.items()}
    if isinstance(in_dict, torch.Tensor):
        return in_dict.detach().cpu() if to_cpu else in_dict.detach()
    return in_dict


__all__ = [
    "garbage_collection_cuda",
    "get_model_size_mb",
    "is_oom_error",
    "move_data_to_device",
    "recursive_detach",
]
