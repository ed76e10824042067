"""Copied as `sitecustomize.py` into the test base image that has Debian's torch, and imported nowhere else.

Debian builds torch without libuv, but torch's stores ask for libuv by default, and torchrun's rendezvous has
no working switch against it (`USE_LIBUV=0` is ignored on the paths that call `TCPStore(...)` with the
default; torch 2.14 and 2.15). So every TCPStore is made without libuv here. The hook costs nothing in a
Python that never imports torch.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder


def _without_libuv(store):
    original = store.__init__

    def __init__(self, *args, **kwargs):
        # Parameters: host, port, world size, master, timeout, wait, multi tenant, fd; the ninth is use_libuv.
        if len(args) > 8:
            args = (*args[:8], False, *args[9:])
        else:
            kwargs["use_libuv"] = False
        original(self, *args, **kwargs)

    store.__init__ = __init__


class _Hook(MetaPathFinder):
    """Lets torch.distributed be imported as ever, then changes the one class of it."""

    def find_spec(self, name, path=None, target=None):
        if name != "torch.distributed":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            if module.is_available():
                _without_libuv(module.TCPStore)

        # setattr, because a loader's type does not say that its methods may be replaced.
        setattr(spec.loader, "exec_module", exec_module)  # noqa: B010
        return spec


sys.meta_path.insert(0, _Hook())
