"""Trainer: configuration and composition. What happens in a fit is in `loop.py`."""

from __future__ import annotations

import difflib
import inspect
import logging
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from trainyard.callbacks.progress import ProgressPrinter
from trainyard.checkpoint.config import CheckpointConfig
from trainyard.checkpoint.engine import Checkpointer
from trainyard.checkpoint.errors import CheckpointError, exit_code
from trainyard.data.connect import eval_feeds, prepare_data, train_feed
from trainyard.environment import Place
from trainyard.errors import MisconfigurationException
from trainyard.logged.metrics import Metrics
from trainyard.loggers import CSVLogger, Logger
from trainyard.loops.fit import FitLoop
from trainyard.loops.schedule import Schedule
from trainyard.loops.state import LoopState
from trainyard.optimization.configure import SchedulerConfig, configure
from trainyard.plugins.precision import make_precision
from trainyard.reproducibility import global_seed
from trainyard.strategies import make_strategy
from trainyard.trainer.facade import TrainerFacade
from trainyard.trainer.persistence import payload, restore_module, restore_optimizers, restore_rank
from trainyard.trainer.progress import Progress, agent_client
from trainyard_api.checkpoints import Fenced

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch.optim import Optimizer

    from trainyard.callbacks.base import Callback
    from trainyard.checkpoint.resume import Loaded
    from trainyard.core.datamodule import LightningDataModule
    from trainyard.core.module import LightningModule
    from trainyard.data.loader import Feed
    from trainyard.strategies.base import Strategy

_log = logging.getLogger("trainyard")

_UNSUPPORTED: dict[str, Any] = {
    "max_time": None, "limit_test_batches": None, "limit_predict_batches": None, "overfit_batches": 0.0,
    "profiler": None, "barebones": False, "plugins": None, "sync_batchnorm": False,
    "reload_dataloaders_every_n_epochs": 0, "model_registry": None,
}  # fmt: skip
"""Arguments of Lightning's that this version knows and does not have, with the only value that they may have."""


class Trainer(TrainerFacade):
    """`lightning.pytorch.Trainer`: the same arguments with the same defaults, and `checkpoint`.

    World size and ranks are torchrun's. With `checkpoint`, or inside a TrainingRun, `fit` resumes by itself and returns
    when its last checkpoint is committed. Raises TypeError for an unknown argument, MisconfigurationException for a
    value that it cannot honour.
    """

    def __init__(
        self, *, accelerator: str = "auto", strategy: str | Strategy = "auto",
        devices: list[int] | str | int = "auto", num_nodes: int = 1, precision: str | int | None = None,
        logger: Logger | Iterable[Logger] | bool | None = None, callbacks: list[Callback] | Callback | None = None,
        fast_dev_run: int | bool = False, max_epochs: int | None = None, min_epochs: int | None = None,
        max_steps: int = -1, min_steps: int | None = None, max_time: str | timedelta | dict[str, int] | None = None,
        limit_train_batches: int | float | None = None, limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None, limit_predict_batches: int | float | None = None,
        overfit_batches: int | float = 0.0, val_check_interval: int | float | None = None,
        check_val_every_n_epoch: int | None = 1, num_sanity_val_steps: int | None = None,
        log_every_n_steps: int | None = None, enable_checkpointing: bool | None = None,
        enable_progress_bar: bool | None = None, enable_model_summary: bool | None = None,
        accumulate_grad_batches: int = 1, gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None, deterministic: bool | str | None = None,
        benchmark: bool | None = None, inference_mode: bool = True, use_distributed_sampler: bool = True,
        profiler: Any = None, detect_anomaly: bool = False, barebones: bool = False, plugins: Any = None,
        sync_batchnorm: bool = False, reload_dataloaders_every_n_epochs: int = 0,
        default_root_dir: str | Path | None = None, enable_autolog_hparams: bool = True,
        model_registry: str | None = None, suggest_integrations: bool = True,
        checkpoint: CheckpointConfig | None = None, **unknown: Any,
    ) -> None:  # fmt: skip
        given = locals()
        _refuse(given, unknown)
        if accumulate_grad_batches < 1:
            raise MisconfigurationException(
                f"accumulate_grad_batches: {accumulate_grad_batches} is less than 1"
            )
        if gradient_clip_algorithm not in (None, "norm", "value"):
            raise MisconfigurationException(
                f"gradient_clip_algorithm: {gradient_clip_algorithm!r} is not 'norm' or 'value'"
            )
        self.place = Place.from_env()
        self.strategy = make_strategy(strategy, self.place, accelerator)
        self.precision_plugin = self.strategy.precision = make_precision(precision)
        self._check_world(devices, num_nodes)
        quick = int(fast_dev_run)
        self.fast_dev_run = bool(quick)
        no_end = max_steps == -1 and not quick
        self.schedule = Schedule(
            max_epochs=1 if quick else max_epochs if max_epochs is not None else 1000 if no_end else -1,
            max_steps=quick or max_steps, min_epochs=min_epochs or 0, min_steps=min_steps or 0,
            val_check_interval=1.0 if val_check_interval is None or quick else val_check_interval,
            check_val_every_n_epoch=check_val_every_n_epoch,
        )  # fmt: skip
        self.limit_train_batches = quick or limit_train_batches
        self.limit_val_batches = quick or limit_val_batches
        self.num_sanity_val_steps = (
            0 if quick else 2 if num_sanity_val_steps is None else num_sanity_val_steps
        )
        self.log_every_n_steps = 50 if log_every_n_steps is None else max(1, log_every_n_steps)
        self.accumulate_grad_batches = accumulate_grad_batches
        self.gradient_clip_val, self.gradient_clip_algorithm = gradient_clip_val, gradient_clip_algorithm
        self.inference_mode, self.use_distributed_sampler = inference_mode, use_distributed_sampler
        self.default_root_dir = Path(default_root_dir or Path.cwd())
        self.callbacks: list[Callback] = [callbacks] if _is_one(callbacks) else list(callbacks or [])  # type: ignore[list-item, arg-type]
        self.printer = ProgressPrinter() if enable_progress_bar is not False else None
        self.loggers = self._make_loggers(logger is not False and not quick, logger)
        self._checkpoint_config = self._pick_checkpoint(
            checkpoint, enable_checkpointing is not False and not quick
        )
        _torch_flags(deterministic, benchmark, detect_anomaly)

        self.should_stop = False
        self.sanity_checking = False
        self.loop_state = LoopState()
        self.metrics = Metrics(self.strategy, [])
        self.progress = Progress(None)
        self.checkpointer: Checkpointer | None = None
        self.optimizers: list[Optimizer] = []
        self.lr_scheduler_configs: list[SchedulerConfig] = []
        self.datamodule: LightningDataModule | None = None
        self._train_feed: Feed | None = None
        self._given_train: Any = None
        self.val_feeds: list[Feed] = []
        self.last_loss: torch.Tensor | None = None
        self.batch_plan: Any = None
        """`data.sampler.Batch` of the batch that is trained on now."""
        self._module: LightningModule | None = None

    # ---- fit

    def fit(  # noqa: PLR0917 - Lightning's signature
        self, model: LightningModule, train_dataloaders: Any = None, val_dataloaders: Any = None,
        datamodule: LightningDataModule | None = None, ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> None:  # fmt: skip
        """Train. A failure that concerns checkpoints ends the process with one line and contract.ExitCode's code."""
        if ckpt_path is not None:
            raise MisconfigurationException(
                "ckpt_path: this version resumes from its own checkpoints only (Trainer(checkpoint=...), or a TrainingRun)"
            )
        failed = True
        try:
            self._fit(model, train_dataloaders, val_dataloaders, datamodule)
            failed = False
        except (CheckpointError, Fenced) as error:
            self._on_exception(error)
            self._leave(error)
        except BaseException as error:
            self._on_exception(error)
            raise
        finally:
            if self.checkpointer is not None:
                self.checkpointer.close(failed=failed)
            self.metrics.finalize("failed" if failed else "success")
        self.strategy.disconnect()

    def _fit(
        self, model: LightningModule, train: Any, val: Any, datamodule: LightningDataModule | None
    ) -> None:
        self.strategy.connect()
        self._module, self.datamodule = model, datamodule
        self._given_train, self._train_feed = train, None
        model.trainer = self
        if datamodule is not None:
            datamodule.trainer = self
        extra = model.configure_callbacks()
        self.callbacks += [extra] if _is_one(extra) else list(extra or [])
        if self.printer is not None:
            self.callbacks.append(self.printer)
        prepare_data(self)
        if datamodule is not None:
            datamodule.setup("fit")
        for callback in self.callbacks:
            callback.setup(self, model, "fit")
        model.setup("fit")
        model.configure_model()

        self.metrics = Metrics(self.strategy, list(self.loggers) if self.is_global_zero else [])
        self.progress = Progress(agent_client())
        self.loop_state = LoopState(seed=self.strategy.peers.broadcast(global_seed()))
        loaded = self._resume()
        self.strategy.setup(model, training=True)
        run_step = self.strategy.step(model, "training_step")
        optimizer, self.lr_scheduler_configs = configure(model.configure_optimizers())
        self.optimizers = [optimizer]
        if loaded is not None:
            restore_optimizers(self, loaded)

        self.val_feeds = eval_feeds(self, val, "val") if _validates(model) else []
        loop = FitLoop(self, run_step, None if loaded is None else lambda: restore_rank(self, loaded))
        model.train()
        loop.call("on_fit_start")
        if self.val_feeds and self.num_sanity_val_steps and loaded is None:
            loop.sanity_check(self.num_sanity_val_steps)
        loop.run()
        loop.call("on_fit_end")
        if datamodule is not None:
            datamodule.teardown("fit")
        for callback in self.callbacks:
            callback.teardown(self, model, "fit")
        model.teardown("fit")

    def _resume(self) -> Loaded | None:
        """Where to go on from; None for a fresh start."""
        if self._checkpoint_config is None:
            self.progress.resumed(step=0, uri="", fell_back="")
            return None
        versions = {"torch": str(torch.__version__), "trainyard": _version()}
        self.checkpointer = Checkpointer(self._checkpoint_config, self.strategy.peers, versions)
        loaded = self.checkpointer.resume()
        if loaded.record is None:
            self.progress.resumed(step=0, uri="", fell_back="")
            return None
        restore_module(self, loaded)
        self.progress.resumed(step=loaded.record.step, uri=loaded.uri, fell_back=loaded.fell_back)
        self.print(f"resumed at step {loaded.record.step} from {loaded.uri}", flush=True)
        return loaded

    def save_checkpoint_now(self) -> bool:
        """Collective: start a save of the present state; False if there is nowhere to, or the last one is on its way."""
        if self.checkpointer is None:
            return False
        state = self.loop_state
        return self.checkpointer.save(state.step, state.cursor, lambda: payload(self))

    def finish_checkpoints(self) -> None:
        """Collective: see the last step committed."""
        if self.checkpointer is not None:
            state = self.loop_state
            self.checkpointer.finish(state.step, state.cursor, lambda: payload(self))

    def _leave(self, error: Exception) -> NoReturn:
        code = exit_code(error)
        print(f"trainyard: rank {self.global_rank}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(code) from error

    def _on_exception(self, error: BaseException) -> None:
        if self._module is None:
            return
        for callback in self.callbacks:
            callback.on_exception(self, self._module, error)
        if self.datamodule is not None:
            self.datamodule.on_exception(error)

    def record(self, name: str, value: Any, *, rank_zero_only: bool, **options: Any) -> None:
        """What `LightningModule.log` does."""
        if rank_zero_only and not self.is_global_zero:
            return
        self.metrics.record(name, value, **options)

    @property
    def train_feed(self) -> Feed:
        """Made when first asked for: configure_optimizers may want to know how many steps there will be."""
        if self._train_feed is None:
            self._train_feed = train_feed(self, self._given_train)
        return self._train_feed

    # ---- composition

    def _check_world(self, devices: Any, num_nodes: int) -> None:
        """torchrun's word counts; what the script says is only compared with it."""
        count = len(devices) if isinstance(devices, list) else devices
        if count in ("auto", -1, "-1"):
            return
        wanted = int(count) * num_nodes
        if self.place.launched and wanted != self.place.world_size:
            _log.warning(
                "Trainer(devices=%s, num_nodes=%s) asks for %d processes; torchrun started %d, which is what counts",
                devices, num_nodes, wanted, self.place.world_size,
            )  # fmt: skip
        elif not self.place.launched and wanted > 1:
            raise MisconfigurationException(
                f"devices: {wanted} processes need a launcher: python -m torch.distributed.run --nproc-per-node {count} "
                f"{Path(sys.argv[0]).name}"
            )

    def _make_loggers(self, enabled: bool, given: Any) -> list[Logger]:
        if not enabled or not self.is_global_zero:
            return []
        if given is None or given is True:
            return [CSVLogger(self.default_root_dir)]
        return [given] if isinstance(given, Logger) else list(given)

    @staticmethod
    def _pick_checkpoint(given: CheckpointConfig | None, enabled: bool) -> CheckpointConfig | None:
        """Inside a TrainingRun its spec decides, so that a script cannot checkpoint where nobody looks."""
        if not enabled:
            return None
        from_env = CheckpointConfig.from_env()
        if from_env is not None and given is not None:
            _log.warning("Trainer(checkpoint=...) gives way to the TrainingRun's spec.checkpoint")
        return from_env or given


def _refuse(given: dict[str, Any], unknown: dict[str, Any]) -> None:
    if unknown:
        name = next(iter(unknown))
        known = [p for p in inspect.signature(Trainer.__init__).parameters if p not in ("self", "unknown")]
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise TypeError(f"Trainer has no argument {name!r}; the nearest is {nearest!r}")
    for name, only in _UNSUPPORTED.items():
        if given[name] != only:
            raise MisconfigurationException(
                f"Trainer({name}={given[name]!r}) is not supported by this version of trainyard"
            )


def _validates(model: LightningModule) -> bool:
    from trainyard.core.module import LightningModule

    return type(model).validation_step is not LightningModule.validation_step


def _is_one(callbacks: Any) -> bool:
    from trainyard.callbacks.base import Callback

    return isinstance(callbacks, Callback)


def _torch_flags(deterministic: bool | str | None, benchmark: bool | None, detect_anomaly: bool) -> None:
    if deterministic:
        torch.use_deterministic_algorithms(True, warn_only=deterministic == "warn")
    if benchmark is not None:
        torch.backends.cudnn.benchmark = benchmark
    if detect_anomaly:
        torch.autograd.set_detect_anomaly(True)


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("trainyard")
    except metadata.PackageNotFoundError:
        return "source"
