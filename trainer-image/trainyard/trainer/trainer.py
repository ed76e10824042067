"""Trainer: configuration and composition. What happens in a fit is in `loops/`."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from trainyard import determinism
from trainyard.accelerators import make_accelerator
from trainyard.checkpoint.config import CheckpointConfig
from trainyard.checkpoint.engine import Checkpointer
from trainyard.checkpoint.errors import CheckpointError, exit_code
from trainyard.core.portable import OWN
from trainyard.data.connect import eval_feeds, prepare_data, train_feed
from trainyard.environment import Place
from trainyard.errors import MisconfigurationException
from trainyard.failure import Watch
from trainyard.logged.metrics import Metrics
from trainyard.loggers.base import Logger
from trainyard.loggers.session import begin
from trainyard.loops.evaluation import EvaluationLoop
from trainyard.loops.fit import FitLoop
from trainyard.loops.hooks import HookCaller
from trainyard.loops.prediction import PredictionLoop
from trainyard.loops.schedule import Schedule
from trainyard.loops.state import LoopState
from trainyard.loops.stop import NoStop
from trainyard.optimization.configure import SchedulerConfig, configure
from trainyard.plugins.environments import use_environment
from trainyard.profilers import make_profiler
from trainyard.reproducibility import global_seed
from trainyard.strategies import equip, launchers, make_strategy
from trainyard.trainer import arguments, defaults
from trainyard.trainer.announce import announce
from trainyard.trainer.buffers import OwnBuffers
from trainyard.trainer.ckpt_access import CheckpointFiles
from trainyard.trainer.facade import TrainerFacade
from trainyard.trainer.persistence import payload, scalars
from trainyard.trainer.progress import Progress, agent_client
from trainyard.trainer.restoring import restore_module, restore_optimizers, restore_rank
from trainyard.trainer.sharding import expected_bytes, layout, size_of_shard
from trainyard.trainer.states import RunningStage, TrainerFn, TrainerState, TrainerStatus
from trainyard_api.checkpoints import Fenced

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from trainyard.callbacks.base import Callback
    from trainyard.checkpoint.resume import Loaded, Opened
    from trainyard.core.datamodule import LightningDataModule
    from trainyard.core.module import LightningModule
    from trainyard.data.loader import Feed
    from trainyard.strategies.base import Strategy
    from trainyard.trainer.rescue import Rescue

_log = logging.getLogger("trainyard")


def _arguments(init: Callable[..., None]) -> Callable[..., None]:
    """Have PL_TRAINER_<NAME> stand for arguments that are left out, and unknown ones refused with the nearest name."""

    @functools.wraps(init)
    def wrapped(self: Trainer, **given: Any) -> None:
        init(self, **arguments.from_environment(given, init))

    return wrapped


class Trainer(CheckpointFiles, TrainerFacade):
    """`lightning.pytorch.Trainer`: the same arguments with the same defaults, `checkpoint` and `virtual_ranks`.

    With `deterministic="elastic"` a step is computed in `virtual_ranks` parts, and the weights are the same, bit for bit,
    at any number of processes up to that.

    World size and ranks are torchrun's. With `checkpoint`, or inside a TrainingRun, `fit` resumes by itself and returns
    when its last checkpoint is committed. Raises TypeError for an unknown argument, MisconfigurationException for a
    value that it cannot honour.
    """

    @_arguments
    def __init__(
        self, *, accelerator: str = "auto", strategy: str | Strategy = "auto",
        devices: list[int] | str | int = "auto", num_nodes: int = 1, precision: str | int | None = None,
        logger: Logger | Iterable[Logger] | bool | None = None, callbacks: list[Callback] | Callback | None = None,
        fast_dev_run: int | bool = False, max_epochs: int | None = None, min_epochs: int | None = None,
        max_steps: int = -1, min_steps: int | None = None, max_time: str | timedelta | dict[str, int] | None = None,
        limit_train_batches: int | float | None = None, limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None, limit_predict_batches: int | float | None = None,
        overfit_batches: int | float = 0.0, val_check_interval: int | float | str | timedelta | dict[str, int] | None = None,
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
        checkpoint: CheckpointConfig | None = None, virtual_ranks: int | None = None,
    ) -> None:  # fmt: skip
        given = arguments.check({k: v for k, v in locals().items() if k != "self"})
        quick = int(fast_dev_run)
        self.fast_dev_run: bool | int = fast_dev_run
        self.barebones = barebones
        self._compose(given)
        self.schedule = Schedule.of(given, quick)
        for stage in ("train", "val", "test", "predict"):
            setattr(self, f"limit_{stage}_batches", quick or given[f"limit_{stage}_batches"])
        self.overfit_batches = overfit_batches
        self.num_sanity_val_steps = 0 if quick else _or(given["num_sanity_val_steps"], 2)
        self.log_every_n_steps = 1 if quick else _or(given["log_every_n_steps"], 50) or sys.maxsize
        self.accumulate_grad_batches = accumulate_grad_batches
        self.gradient_clip_val, self.gradient_clip_algorithm = gradient_clip_val, gradient_clip_algorithm
        self.inference_mode, self.use_distributed_sampler = inference_mode, use_distributed_sampler
        self.reload_dataloaders_every_n_epochs = reload_dataloaders_every_n_epochs
        self.enable_autolog_hparams = enable_autolog_hparams
        self.default_root_dir = str(default_root_dir or Path.cwd())
        self.loggers = defaults.make_loggers(given["logger"], self.default_root_dir, quick=bool(quick))
        saves = given["enable_checkpointing"] is not False and not quick
        self._checkpoint_config = self._pick_checkpoint(checkpoint, saves)
        self.callbacks: list[Callback] = defaults.with_defaults(
            defaults.as_callbacks(callbacks), checkpointing=saves and self._checkpoint_config is None,
            progress_bar=given["enable_progress_bar"] is not False,
            summary=given["enable_model_summary"] is not False and not quick, max_time=max_time,
        )  # fmt: skip
        self.profiler = make_profiler(given["profiler"])
        _torch_flags("elastic" if self.strategy.virtual_ranks else deterministic, benchmark, detect_anomaly)
        self._begin()

    def _compose(self, given: dict[str, Any]) -> None:
        """The strategy, with its place, accelerator and precision."""
        plugins = given["plugins"]
        self.plugins = (
            list(plugins) if isinstance(plugins, list | tuple) else [] if plugins is None else [plugins]
        )
        use_environment(self.plugins, given["num_nodes"])
        accelerator = make_accelerator(given["accelerator"])
        asked, nodes = launchers.asked_devices(accelerator, given["devices"]), given["num_nodes"]
        place = Place.from_env()
        processes = place.world_size if place.launched else (asked or 1) * nodes
        name = given["strategy"]
        if name == "auto" and processes > 1 and not place.launched and launchers.is_interactive():
            name = "ddp_notebook"
        self.strategy = make_strategy(name, place, accelerator, devices=given["devices"], processes=processes)
        self.place = self.strategy.place = launchers.place_for(self.strategy.launch, asked, nodes)
        equip(self.strategy, given["precision"], self.plugins, given["sync_batchnorm"])
        determinism.equip(
            self.strategy, determinism.virtual_ranks(given["deterministic"], given["virtual_ranks"])
        )

    def _begin(self) -> None:
        """What every fit makes anew, so that there is something to be read before one."""
        self.state = TrainerState()
        self.should_stop = False
        self.loop_state = LoopState()
        self.metrics = Metrics(self.strategy, [])
        self.progress = Progress(None)
        self.stop: Any = NoStop()
        self.checkpointer: Checkpointer | None = None
        self.optimizers: list[Optimizer] = []
        self.lr_scheduler_configs: list[SchedulerConfig] = []
        self.datamodule: LightningDataModule | None = None
        self._train_feed: Feed | None = None
        self._given: dict[str, Any] = {}
        """Loaders that were given to the entry point, by stage."""
        self.val_feeds: list[Feed] = []
        self.eval_feeds: list[Feed] = []
        self.last_loss: torch.Tensor | None = None
        self.batch_plan: Any = None
        """`data.sampler.Batch` of the batch that is trained on now."""
        self.is_last_batch = False
        self.fit_loop: FitLoop | None = None
        self.own_buffers: OwnBuffers | None = None
        self.rescue: Rescue | None = None
        """Of a fit that is to save when something raises."""
        self.predict_loop: PredictionLoop | None = None
        self._module: LightningModule | None = None
        self.hooks: HookCaller

    # ---- entry points

    @launchers.entry_point
    def fit(  # noqa: PLR0917 - Lightning's signature
        self, model: LightningModule, train_dataloaders: Any = None, val_dataloaders: Any = None,
        datamodule: LightningDataModule | None = None, ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> None:  # fmt: skip
        """Train. A failure that concerns checkpoints ends the process with one line and contract.ExitCode's code."""
        train_dataloaders, datamodule = _datamodule_of(train_dataloaders, datamodule)
        self.should_stop = False
        self.ask_for_checkpoint(ckpt_path, weights_only, model_given=True)
        self._enter(
            TrainerFn.FITTING,
            model,
            datamodule,
            {"train": train_dataloaders, "val": val_dataloaders},
            self._fit,
        )

    @launchers.entry_point
    def validate(  # noqa: PLR0917 - Lightning's signature
        self, model: LightningModule | None = None, dataloaders: Any = None, ckpt_path: str | Path | None = None,
        verbose: bool = True, datamodule: LightningDataModule | None = None, weights_only: bool | None = None,
    ) -> list[dict[str, float]]:  # fmt: skip
        """One epoch of validation; by loader: what was logged."""
        self.ask_for_checkpoint(ckpt_path, weights_only, model_given=model is not None)
        return self._evaluate(TrainerFn.VALIDATING, model, dataloaders, verbose, datamodule)

    @launchers.entry_point
    def test(  # noqa: PLR0917 - Lightning's signature
        self, model: LightningModule | None = None, dataloaders: Any = None, ckpt_path: str | Path | None = None,
        verbose: bool = True, datamodule: LightningDataModule | None = None, weights_only: bool | None = None,
    ) -> list[dict[str, float]]:  # fmt: skip
        """One epoch of test; by loader: what was logged."""
        self.ask_for_checkpoint(ckpt_path, weights_only, model_given=model is not None)
        return self._evaluate(TrainerFn.TESTING, model, dataloaders, verbose, datamodule)

    @launchers.entry_point
    def predict(  # noqa: PLR0917 - Lightning's signature
        self, model: LightningModule | None = None, dataloaders: Any = None,
        datamodule: LightningDataModule | None = None, return_predictions: bool | None = None,
        ckpt_path: str | Path | None = None, weights_only: bool | None = None,
    ) -> list[Any] | list[list[Any]] | None:  # fmt: skip
        """What predict_step returned for this rank's batches: a list, or a list by loader if there are several."""
        dataloaders, datamodule = _datamodule_of(dataloaders, datamodule)
        self.ask_for_checkpoint(ckpt_path, weights_only, model_given=model is not None)

        def work() -> Any:
            self._start(loading=True)
            self.eval_feeds = eval_feeds(self, self._given["predict"], "predict")
            if not self.eval_feeds:
                raise MisconfigurationException(
                    "no data to predict: give predict a DataLoader, or define predict_dataloader"
                )
            self.state.stage = RunningStage.PREDICTING
            self.predict_loop = PredictionLoop(self, return_predictions=return_predictions is not False)
            answer = self.predict_loop.run(self.eval_feeds)
            self._end()
            return answer

        return self._enter(TrainerFn.PREDICTING, model, datamodule, {"predict": dataloaders}, work)

    def _evaluate(
        self, fn: TrainerFn, model: LightningModule | None, dataloaders: Any, verbose: bool, datamodule: Any
    ) -> list[dict[str, float]]:
        dataloaders, datamodule = _datamodule_of(dataloaders, datamodule)
        stage, hook = ("val", "validation") if fn is TrainerFn.VALIDATING else ("test", "test")

        def work() -> list[dict[str, float]]:
            if not _has_step(self.lightning_module, f"{hook}_step"):
                raise MisconfigurationException(f"{type(self.lightning_module).__name__} has no {hook}_step")
            self._start(loading=True)
            self.eval_feeds = eval_feeds(self, self._given[stage], stage)
            if not self.eval_feeds:
                raise MisconfigurationException(
                    f"no data: give {fn.value} a DataLoader, or define {stage}_dataloader"
                )
            self.state.stage = RunningStage.VALIDATING if stage == "val" else RunningStage.TESTING
            loop = EvaluationLoop(self, hook)
            loop.run(self.eval_feeds)
            if verbose and self.is_global_zero:
                from trainyard.loops.table import results_table

                print(results_table(loop.found, fn.value), flush=True)
            self._end()
            return loop.found

        return self._enter(fn, model, datamodule, {stage: dataloaders}, work)  # type: ignore[no-any-return]

    # ---- around every entry point

    def _enter(
        self, fn: TrainerFn, model: LightningModule | None, datamodule: LightningDataModule | None,
        given: dict[str, Any], work: Callable[[], Any],
    ) -> Any:  # fmt: skip
        """Run `work` with all attached, and see to what its end asks for, whichever it is."""
        self.state = TrainerState(TrainerStatus.RUNNING, fn, None)
        failed = True
        with Watch(graceful=fn is TrainerFn.FITTING) as watcher:
            try:
                self.strategy.connect()
                self.stop = watcher.open(self.place.rank, self.place.world_size)
                self._attach(model, datamodule, given)
                answer = work()
                watcher.finish(self.strategy.peers)
                failed = False
                self.state.status = TrainerStatus.FINISHED
                return answer
            except BaseException as error:
                watcher.failed(error)
                self.strategy.failed = True
                self._on_exception(error)
                if isinstance(error, CheckpointError | Fenced) and self._checkpoint_config is not None:
                    self._leave(error)  # its code tells the operator what to do
                raise
            finally:
                self.state.stage = None
                if self.checkpointer is not None:
                    self.checkpointer.close(failed=failed)
                    self.checkpointer = None
                self._close_feeds()
                self.metrics.finalize("failed" if failed else "success")
                self.profiler.describe()
                self.profiler.teardown(fn.value)

    def _attach(self, model: LightningModule | None, datamodule: Any, given: dict[str, Any]) -> None:
        from trainyard.core.compiled import unwrap

        module = self._module if model is None else unwrap(model)
        if module is None:
            raise MisconfigurationException(f"{self.state.fn}: there is no module yet; give one")
        self._module = module
        if datamodule is not None or model is not None:
            self.datamodule = datamodule
        self._given, self._train_feed = given, None
        module.trainer = self
        if datamodule is not None:
            datamodule.trainer = self
        self.metrics = Metrics(self.strategy, list(self.loggers) if self.is_global_zero else [])
        self.profiler.attach(self, str(self.state.fn))
        self.hooks = HookCaller(self)
        defaults.attach_module_callbacks(self)

    def _start(self, *, loading: bool = False, resumed: Opened | None = None) -> None:
        """Agree on the loggers' runs, prepare data, call setup, make the model."""
        self._take_up_loggers(resumed)
        module, datamodule, stage = self.lightning_module, self.datamodule, str(self.state.fn)
        prepare_data(self)
        if datamodule is not None:
            datamodule.setup(stage)
        for callback in self.callbacks:
            callback.setup(self, module, stage)
        module.setup(stage)
        with self.strategy.init_context():
            module.configure_model()
        if loading:
            self.strategy.setup(module, training=False)
            if (source := self.open_checkpoint()) is not None:
                restore_module(self, source, position=False)
            announce(self)

    def _end(self) -> None:
        module, datamodule, stage = self.lightning_module, self.datamodule, str(self.state.fn)
        self.strategy.teardown(module)
        if datamodule is not None:
            datamodule.teardown(stage)
        for callback in self.callbacks:
            callback.teardown(self, module, stage)
        module.teardown(stage)

    # ---- fit

    def _fit(self) -> None:
        module = self.lightning_module
        self.progress = Progress(agent_client())
        resumed = (
            self._resume()
        )  # before setup: a ModelCheckpoint asks there for the folder of the loggers' run
        self._start(resumed=resumed)
        self.loop_state = LoopState(seed=self.strategy.peers.broadcast(global_seed()))
        source = None if resumed else self.open_checkpoint()
        self.strategy.setup(module, training=True)
        loaded = self._load(resumed) if resumed else source
        if loaded is not None:
            restore_module(self, loaded)
        self.own_buffers = OwnBuffers(module, self.global_rank)
        self.metrics.each_logger(lambda logger: logger.resume(self.loop_state.stepped))
        self.optimizers, self.lr_scheduler_configs = configure(module)
        self.optimizers = self.strategy.setup_optimizers(module, self.optimizers)
        if self.checkpointer is not None:
            self.checkpointer.prepare(expected_bytes(self))
        self.val_feeds = (
            eval_feeds(self, self._given["val"], "val") if _has_step(module, "validation_step") else []
        )
        self.fit_loop = FitLoop(self, None if loaded is None else lambda: restore_rank(self, loaded))
        module.train()
        self.hooks("on_fit_start")
        if loaded is not None:
            # Lightning's order: callbacks make the optimizers what they were before their states are restored.
            restore_optimizers(self, loaded)
        announce(self)
        self.fit_loop.run()
        self.hooks("on_fit_end")
        self._end()

    def _take_up_loggers(self, resumed: Opened | None) -> None:
        """A logger that cannot say which run it logs to is left out."""
        own = None if resumed is None else resumed.main.get(OWN)
        kept = begin(self.loggers, self.strategy.peers, saved=(own or {}).get("loggers", []))
        self.metrics.loggers = kept if self.is_global_zero else []

    def _resume(self) -> Opened | None:
        """Where to go on from; None for a fresh start."""
        if self._checkpoint_config is None:
            self.progress.resumed(step=0, uri="", fell_back="")
            return None
        versions = {"torch": str(torch.__version__), "trainyard": _version()}
        self.checkpointer = Checkpointer(self._checkpoint_config, self.strategy.peers, versions)
        opened = self.checkpointer.open()
        if opened is None:
            self.progress.resumed(step=0, uri="", fell_back="")
        return opened

    def _load(self, opened: Opened) -> Loaded | None:
        """The tensors of what was opened, or of what it turns out to be instead."""
        assert self.checkpointer is not None  # noqa: S101 - it has opened
        whole = not self.strategy.sharded_parameters(self.lightning_module)
        loaded = self.checkpointer.load(layout(self), shared=whole)
        if loaded is None:
            self.progress.resumed(step=0, uri="", fell_back="")
            return None
        self.progress.resumed(step=loaded.record.step, uri=loaded.uri, fell_back=loaded.fell_back)
        self.print(f"resumed at step {loaded.record.step} from {loaded.uri}", flush=True)
        return loaded

    def save_checkpoint_now(self, reason: str = "") -> bool:
        """Collective: start a save of the present state; False if there is nowhere to, or the last one is on its way.
        `reason`: see `Record.reason`."""
        if self.checkpointer is None:
            return False
        state = self.loop_state
        return self.checkpointer.save(
            state.step, state.cursor, lambda: payload(self), reason=reason, metrics=scalars(self)
        )

    def finish_checkpoints(self, reason: str = "end") -> None:
        """Collective: see the last step committed."""
        if self.checkpointer is not None:
            state = self.loop_state
            self.checkpointer.finish(
                state.step, state.cursor, lambda: payload(self), reason=reason, metrics=scalars(self)
            )

    def leave_checkpoints(self, seconds: float) -> str:
        """Collective: see the last step committed if there is time for that, `seconds` from now on at most; what keeps it
        from that, empty if nothing does."""
        if self.checkpointer is None:
            return ""
        state = self.loop_state
        return self.checkpointer.leave(
            state.step, state.cursor, lambda: payload(self), seconds=seconds, size=size_of_shard(self),
            metrics=scalars(self),
        )  # fmt: skip

    def _leave(self, error: Exception) -> NoReturn:
        code = exit_code(error)
        print(f"trainyard: rank {self.global_rank}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(code) from error

    def _on_exception(self, error: BaseException) -> None:
        self.state.status = TrainerStatus.INTERRUPTED
        if self._module is None:
            return
        for callback in self.callbacks:
            callback.on_exception(self, self._module, error)
        if self.datamodule is not None:
            self.datamodule.on_exception(error)

    @property
    def train_feed(self) -> Feed:
        """Made when first asked for: configure_optimizers may want to know how many steps there will be."""
        if self._train_feed is None:
            self._train_feed = train_feed(self, self._given.get("train"))
        return self._train_feed

    def reload_train_feed(self) -> None:
        """At the start of an epoch: ask train_dataloader again, if reload_dataloaders_every_n_epochs says so."""
        every, epoch = self.reload_dataloaders_every_n_epochs, self.loop_state.epoch
        if every and epoch and epoch % every == 0:
            self._close_feeds()
            self._train_feed = None
            if _has_step(self.lightning_module, "validation_step"):
                self.val_feeds = eval_feeds(self, self._given["val"], "val")

    def _close_feeds(self) -> None:
        for feed in (self._train_feed, *self.val_feeds, *self.eval_feeds):
            if feed is not None:
                feed.close()

    @property
    def accumulating(self) -> bool:
        """Whether gradients of earlier batches wait for the optimizer's step."""
        return self.fit_loop is not None and self.fit_loop.optimization.window_open

    # ---- composition

    def init_module(self, empty_init: bool | None = None) -> Any:
        """Context to make a module in: right away with the precision's dtype and on the strategy's device."""
        import contextlib

        stack = contextlib.ExitStack()
        stack.enter_context(self.strategy.device)
        stack.enter_context(self.strategy.init_context(empty_init))  # last, for it may be the meta device
        return stack

    @staticmethod
    def _pick_checkpoint(given: CheckpointConfig | None, enabled: bool) -> CheckpointConfig | None:
        """Inside a TrainingRun its spec decides, so that a script cannot checkpoint where nobody looks."""
        if not enabled:
            return None
        from_env = CheckpointConfig.from_env()
        if from_env is not None and given is not None:
            _log.warning("Trainer(checkpoint=...) gives way to the TrainingRun's spec.checkpoint")
        return from_env or given


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _datamodule_of(loaders: Any, datamodule: Any) -> tuple[Any, Any]:
    """A data module may be given in the place of the loaders (Lightning's rule)."""
    from trainyard.core.datamodule import LightningDataModule

    if isinstance(loaders, LightningDataModule):
        if datamodule is not None:
            raise MisconfigurationException("datamodule: two of them were given")
        return None, loaders
    if loaders is not None and datamodule is not None:
        raise MisconfigurationException("dataloaders and a datamodule were given: leave one of them out")
    return loaders, datamodule


def _has_step(module: LightningModule, name: str) -> bool:
    from trainyard.optimization.automatic import overrides

    return overrides(module, name)


def _torch_flags(deterministic: bool | str | None, benchmark: bool | None, detect_anomaly: bool) -> None:
    if deterministic:
        torch.use_deterministic_algorithms(True, warn_only=deterministic == "warn")
        # https://docs.nvidia.com/cuda/cublas: results are reproducible with a workspace of fixed size.
        import os

        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if deterministic == determinism.ELASTIC:
        determinism.use_one_thread()
        benchmark = bool(benchmark)  # it chooses kernels by how long they take
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
