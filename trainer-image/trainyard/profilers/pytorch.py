"""Operators: torch.profiler, with the actions of the training in its traces."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainyard.errors import MisconfigurationException
from trainyard.profilers.profiler import Profiler

if TYPE_CHECKING:
    from torch.autograd.profiler import record_function
    from torch.utils.hooks import RemovableHandle

    from trainyard.trainer.trainer import Trainer

_TIMES = (
    "cpu_time",
    "cuda_time",
    "device_time",
    "cpu_memory_usage",
    "cuda_memory_usage",
    "device_memory_usage",
)


class PyTorchProfiler(Profiler):
    """`lightning.pytorch.profilers.PyTorchProfiler`.

    Each of training_step, validation_step, test_step and predict_step has a `schedule` of its own, counted in its calls;
    the default waits for one, warms up in one and records three. `profiler_kwargs` go to torch.profiler.profile. The report has
    a table of operators for each of them, over all that was recorded; a Chrome trace of each recording goes to
    `<dirpath>/<stage>-<filename>-<step function>-<n>-<rank>.pt.trace.json`, unless `export_to_chrome` is False or there is
    an `on_trace_ready`. `record_module_names` marks the forward of each layer. `emit_nvtx` (CUDA only) marks for Nsight what
    nothing here records then. Raises MisconfigurationException for arguments that torch.profiler does not have.
    """

    STEP_FUNCTIONS = frozenset(("training_step", "validation_step", "test_step", "predict_step"))
    AVAILABLE_SORT_KEYS = frozenset(
        ("count", *_TIMES, *(f"{t}_total" for t in _TIMES[:3]), *(f"self_{t}_total" for t in _TIMES[:3]),
         *(f"self_{t}" for t in _TIMES[3:]))
    )  # fmt: skip

    def __init__(  # noqa: PLR0917 - Lightning's signature
        self, dirpath: str | Path | None = None, filename: str | None = None, group_by_input_shapes: bool = False,
        emit_nvtx: bool = False, export_to_chrome: bool = True, row_limit: int = 20, sort_by_key: str | None = None,
        record_module_names: bool = True, table_kwargs: dict[str, Any] | None = None, **profiler_kwargs: Any,
    ) -> None:  # fmt: skip
        import torch

        super().__init__(dirpath, filename)
        if sort_by_key is not None and sort_by_key not in self.AVAILABLE_SORT_KEYS:
            raise MisconfigurationException(
                f"sort_by_key: {sort_by_key!r} is none of {', '.join(sorted(self.AVAILABLE_SORT_KEYS))}"
            )
        known = set(inspect.signature(torch.profiler.profile).parameters)
        if unknown := sorted(set(profiler_kwargs) - known):
            raise MisconfigurationException(
                f"torch.profiler.profile has no {', '.join(unknown)}; it has {', '.join(sorted(known))}"
            )
        if emit_nvtx and not torch.cuda.is_available():
            raise MisconfigurationException("emit_nvtx: torch sees no CUDA device here")
        self._group_by_input_shapes, self._emit_nvtx = group_by_input_shapes, emit_nvtx
        self._export_to_chrome, self._row_limit = export_to_chrome, row_limit
        self._sort_by_key = sort_by_key or f"{'device' if torch.cuda.is_available() else 'cpu'}_time_total"
        self._record_module_names, self._table_kwargs = record_module_names, table_kwargs or {}
        self._handler = profiler_kwargs.pop("on_trace_ready", None)
        self._schedule = profiler_kwargs.pop("schedule", None) or torch.profiler.schedule(
            wait=1, warmup=1, active=3, repeat=1
        )
        self._kwargs = {"record_shapes": group_by_input_shapes} | profiler_kwargs
        self._module: torch.nn.Module | None = None
        self._handles: list[RemovableHandle] = []
        self._open: dict[str, record_function] = {}
        self._running: torch.profiler.profile | None = None
        self._function = ""
        """The step function that `_running` is of."""
        self._calls: dict[str, int] = {}
        self._traces: dict[str, int] = {}
        self._averages: dict[str, Any] = {}
        """By step function: torch's EventList of averages."""
        self._nvtx: Any = None

    def attach(self, trainer: Trainer, stage: str) -> None:
        self._module = trainer.lightning_module
        self._calls.clear()
        self._traces.clear()
        self._averages.clear()
        super().attach(trainer, stage)

    # ---- actions

    def start(self, action_name: str) -> None:
        if (function := self._step_function(action_name)) and function != self._function:
            self._pause()
            self._begin(function)
        if self._recording or self._nvtx is not None:
            from torch.profiler import record_function

            mark = self._open[action_name] = record_function(action_name)
            mark.__enter__()  # type: ignore[no-untyped-call]

    def stop(self, action_name: str) -> None:
        mark = self._open.pop(action_name, None)
        if mark is not None:
            mark.__exit__(None, None, None)
        if self._running is not None and self._step_function(action_name) == self._function:
            self._calls[self._function] += 1
            self._running.step()
            self._mark_modules()

    @property
    def _recording(self) -> bool:
        from torch.profiler import ProfilerAction

        return self._running is not None and self._running.current_action is not ProfilerAction.NONE

    def _step_function(self, action: str) -> str:
        """ "" for other actions: the user's own "Net.training_step" is none of ours."""
        name = action.rpartition(".")[2]
        return name if name in self.STEP_FUNCTIONS and action.startswith("[Strategy]") else ""

    # ---- torch's profiler

    def _begin(self, function: str) -> None:
        import torch

        self._function = function
        if self._emit_nvtx:
            if self._nvtx is None:
                torch.cuda.cudart().cudaProfilerStart()  # type: ignore[no-untyped-call]
                self._nvtx = torch.autograd.profiler.emit_nvtx(  # type: ignore[no-untyped-call]
                    record_shapes=self._group_by_input_shapes
                )
                self._nvtx.__enter__()
                self._mark_modules()
            return
        before = self._calls.setdefault(function, 0)
        self._running = torch.profiler.profile(
            schedule=lambda step: self._schedule(before + step), on_trace_ready=self._ready, **self._kwargs
        )
        self._running.start()
        self._mark_modules()

    def _pause(self) -> None:
        """Another step function is about to run, and torch has one profiler at a time."""
        running, self._running = self._running, None
        if running is not None:
            running.stop()
        self._mark_modules()
        self._function = ""

    def _ready(self, profile: Any) -> None:
        """A recording is complete."""
        averages = profile.key_averages(group_by_input_shape=self._group_by_input_shapes)
        known = self._averages.get(self._function)
        self._averages[self._function] = averages if known is None else _merged(known, averages)
        if self._handler is not None:
            self._handler(profile)
        elif self._export_to_chrome:
            number = self._traces[self._function] = self._traces.get(self._function, 0) + 1
            path = self._path(f"{self._function}-{number}", ".pt.trace.json")
            path.parent.mkdir(parents=True, exist_ok=True)
            profile.export_chrome_trace(str(path))

    def _mark_modules(self) -> None:
        """Hooks on all layers as long as something records, and none otherwise."""
        wanted = self._record_module_names and (self._recording or self._nvtx is not None)
        if not wanted:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()
        elif not self._handles and self._module is not None:
            for name, module in self._module.named_modules():
                if name:
                    self._mark(name, module)

    def _mark(self, name: str, module: Any) -> None:
        from torch.profiler import record_function

        label, marks = f"[module]{type(module).__name__}: {name}", []

        def enter(module: Any, inputs: Any) -> None:
            mark = record_function(label)
            mark.__enter__()  # type: ignore[no-untyped-call]
            marks.append(mark)

        def leave(module: Any, inputs: Any, output: Any) -> None:
            if marks:
                marks.pop().__exit__(None, None, None)

        self._handles += [
            module.register_forward_pre_hook(enter),
            module.register_forward_hook(leave, always_call=True),
        ]

    # ---- the report

    def summary(self) -> str:
        if not self._averages:
            return ""
        parts = [self._heading()]
        for function, averages in self._averages.items():
            table = averages.table(
                **{"sort_by": self._sort_by_key, "row_limit": self._row_limit} | self._table_kwargs
            )
            parts.append(f"\nProfile stats for: {function}\n{table}")
        return "\n".join(parts)

    def describe(self) -> None:
        self._pause()
        super().describe()

    def teardown(self, stage: str | None) -> None:
        self._pause()
        for mark in reversed(self._open.values()):
            mark.__exit__(None, None, None)
        self._open.clear()
        if self._nvtx is not None:
            import torch

            self._nvtx.__exit__(None, None, None)
            torch.cuda.cudart().cudaProfilerStop()  # type: ignore[no-untyped-call]
            self._nvtx = None
            self._mark_modules()


def _merged(known: Any, new: Any) -> Any:
    """The averages of two recordings."""

    def key(average: Any) -> tuple[str, ...]:
        return (
            average.key,
            str(average.device_type),
            str(average.is_user_annotation),
            str(average.input_shapes),
        )

    by_key = {key(average): average for average in known}
    for average in new:
        if (same := by_key.get(key(average))) is not None:
            same.add(average)
        else:
            known.append(average)
    return known
