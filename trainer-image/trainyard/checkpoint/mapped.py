"""A file that tensors are copied into as if it were memory.

What costs time about a new file is not the copy but its pages: they are allocated, zeroed and put into the page table one
by one, at a fifth of the speed of memory. So a file is mapped once and written again and again, through the same mapping.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import logging
import mmap
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

log = logging.getLogger("trainyard.checkpoint")

_GRAIN = 2 << 20
"""Bytes: files are mapped in multiples of it, so that a header that grows a little does not need another mapping."""
_IN_PLACE = frozenset({"tmpfs", "ext2", "ext3", "ext4", "xfs", "overlay"})
"""File systems on which a page that was written once can be written again without new space on the disk."""
_SMALL = 1 << 20
"""Bytes: a larger tensor is worth several threads."""
_POPULATE_WRITE = 23
"""madvise(2), MADV_POPULATE_WRITE: Linux 5.14."""

Identity = tuple[int, int]
"""Device and inode."""


def identity(path: Path) -> Identity:
    """Raises OSError."""
    found = path.stat()
    return found.st_dev, found.st_ino


class MappedFile:
    """Open, locked while it is being written, and mapped from its beginning. Raises OSError."""

    def __init__(self, path: Path, *, create: bool) -> None:
        """`create`: a new one. Raises BlockingIOError when another process writes it."""
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT | os.O_EXCL if create else 0)
        self._descriptor = os.open(path, flags, 0o600)
        self._map: mmap.mmap | None = None
        self._memory: torch.Tensor | None = None
        self._pinned = 0
        """Bytes, from the beginning, into which a CUDA device may write by itself; -1 if it may not."""
        try:
            self.lock()
        except BaseException:
            os.close(self._descriptor)
            raise
        found = os.fstat(self._descriptor)
        self.identity: Identity = found.st_dev, found.st_ino
        file_system = _file_system(found.st_dev)
        self._in_place = file_system in _IN_PLACE
        self._by_write = file_system not in ("", "tmpfs")
        """On a disk, a page that was written back meanwhile faults when it is written through a mapping. write(2) does not:
        measured on ext4 (Linux 6.18), a quarter over the copy in memory instead of 150 %."""
        self._whole = 0
        """Bytes, from the beginning, that are known to have space on the disk."""
        self._touched = 0
        """Bytes, from the beginning, that are in the page table, or were."""

    def lock(self) -> None:
        """Raises BlockingIOError."""
        fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def unlock(self) -> None:
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    @property
    def links(self) -> int:
        """Names that the file has: 0 when it is deleted."""
        return os.fstat(self._descriptor).st_nlink

    def resize(self, size: int) -> None:
        """Make it exactly `size` bytes, all of which have space on the disk and are mapped."""
        import torch

        if size > self._pinned > 0:
            # What a device knows beyond the old end are pages that are no longer the file's.
            self._unpin()
        self._pinned = min(self._pinned, size)
        self._allocate(size)
        if self._map is None or len(self._map) < size:
            self._unmap()
            capacity = -(-size // _GRAIN) * _GRAIN
            os.ftruncate(self._descriptor, capacity)
            self._map = mmap.mmap(self._descriptor, capacity)
            self._memory = torch.frombuffer(self._map, dtype=torch.uint8)
        os.ftruncate(self._descriptor, size)
        self._whole, self._touched = size, min(self._touched, size)
        if not self._in_place:
            # Else a full disk would be a SIGBUS in the middle of the copy.
            self._populate(size)

    def _allocate(self, size: int) -> None:
        """A hole would be a SIGBUS on a full disk, too."""
        if size <= self._whole:
            return
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self._descriptor, self._whole, size - self._whole)
        else:
            for begin in range(self._whole, size, _GRAIN):
                os.pwrite(self._descriptor, bytes(min(_GRAIN, size - begin)), begin)
        self._whole = size

    def populate(self, size: int) -> None:
        """Put the first `size` bytes into the page table, so that no write to them faults; they have any content then."""
        if self._touched < size:
            self._populate(size)
            self._touched = size

    def _populate(self, size: int) -> None:
        assert self._memory is not None  # noqa: S101 - after resize()
        madvise = _madvise()
        if madvise is None:
            self._memory[:size].zero_()
            return
        # By ctypes, which lets other threads run; mmap.madvise does not.
        length = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        if madvise(self._memory.data_ptr(), length, _POPULATE_WRITE):
            number = ctypes.get_errno()
            # EFAULT: a write would be a SIGBUS. EINVAL: an old kernel.
            if number != errno.EINVAL:
                number = errno.ENOSPC if number == errno.EFAULT else number
                raise OSError(number, os.strerror(number))

    def write(self, data: bytes) -> None:
        """At the beginning."""
        assert self._map is not None  # noqa: S101 - after resize()
        self._map[: len(data)] = data

    def copy(self, placed: Sequence[tuple[int, torch.Tensor]]) -> None:
        """Each tensor to the byte where it belongs: aligned to its element size, inside of the file. Row-major, conjugates
        resolved. Returns when all is there."""
        import torch

        assert self._memory is not None  # noqa: S101 - after resize()
        streams: dict[Any, Any] = {}
        memory, move = self._memory, ctypes.memmove
        base, usual = memory.data_ptr(), (torch.Tensor, torch.nn.Parameter)
        with torch.no_grad():
            for begin, tensor in placed:
                size = tensor.nbytes
                if not size:
                    continue
                if begin < 0 or begin + size > self._whole:
                    raise ValueError(f"a tensor of {size} bytes at byte {begin} of {self._whole}")
                if size <= _SMALL and _bare(tensor, usual):
                    # A view of the target, of the right dtype and shape, would take ten times as long.
                    move(base + begin, tensor.data_ptr(), size)
                    continue
                if self._by_write and _bare(tensor, usual):
                    self._write_at(begin, tensor.data_ptr(), size)
                    continue
                target = memory[begin : begin + size].view(tensor.dtype).view(tensor.shape)
                if tensor.device.type == "cuda":
                    self._pin()
                    streams[tensor.device] = torch.cuda.current_stream(tensor.device)
                target.copy_(tensor, non_blocking=tensor.device.type == "cuda")
        for stream in streams.values():
            stream.synchronize()
        self._touched = self._whole

    def _write_at(self, begin: int, address: int, size: int) -> None:
        """The `size` bytes of memory from `address` on, at byte `begin`."""
        memory, done = memoryview((ctypes.c_char * size).from_address(address)), 0
        while done < size:  # at most 2 GiB a call
            done += os.pwrite(self._descriptor, memory[done:], begin + done)

    def _pin(self) -> None:
        """Let devices write into the mapping by themselves. Where the file system does not allow it (disks), the driver
        copies by way of a buffer of its own."""
        assert self._memory is not None  # noqa: S101 - after resize()
        if not self._pinned:
            failed = int(_cudart().cudaHostRegister(self._memory.data_ptr(), self._whole, 0))
            if failed:
                log.debug("staging file is not pinned: CUDA error %d", failed)
            self._pinned = -1 if failed else self._whole

    def _unpin(self) -> None:
        if self._pinned > 0 and self._memory is not None:
            _cudart().cudaHostUnregister(self._memory.data_ptr())
        self._pinned = 0

    def _unmap(self) -> None:
        self._unpin()
        # Not closed by hand: the traceback of a copy that failed may still refer to it.
        self._memory, self._map, self._touched = None, None, 0

    def close(self) -> None:
        if self._descriptor >= 0:
            self._unmap()
            os.close(self._descriptor)
            self._descriptor = -1


def _bare(tensor: torch.Tensor, usual: tuple[type, ...]) -> bool:
    """Whether its bytes in memory are those that it stands for. Not if its storage is gone (FSDP frees some): torch says so."""
    return (
        type(tensor) in usual and tensor.is_cpu and tensor.is_contiguous()
        and not tensor.is_conj() and not tensor.is_neg() and tensor.data_ptr() != 0
    )  # fmt: skip


def _cudart() -> Any:
    import torch

    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


@functools.cache
def _madvise() -> Any:
    if sys.platform != "linux":
        return None
    found = ctypes.CDLL(None, use_errno=True).madvise
    found.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return found


def _file_system(device: int) -> str:
    """Type of the file system that is the device `device`; "" if nobody says."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
            # proc(5): "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue"
            before, _, after = line.partition(" - ")
            if before.split()[2:3] == [wanted]:
                return after.split()[0]
    return ""
