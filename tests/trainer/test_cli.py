"""`trainyard fit|validate|test|predict|export`, and LightningCLI."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import trainyard as L
from tests.trainer.cli_models import Activation, Data, Deep, Net, Sizes
from tests.trainer.forkhost import Host
from trainyard.callbacks import EarlyStopping, Timer
from trainyard.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from trainyard.cli.main import main
from trainyard.loggers import CSVLogger
from trainyard.utilities.yaml import parse

HERE = "tests.trainer.cli_models"
RUN = f"""
seed_everything: 7
model:
  class_path: {HERE}.Net
  init_args:
    lr: 1e-3
    activation: GELU
    sizes: {{width: 8}}
data: {{class_path: {HERE}.Data}}
trainer:
  max_epochs: 1
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - {{class_path: EarlyStopping, init_args: {{monitor: val}}}}
  logger: {{class_path: CSVLogger, init_args: {{save_dir: logs}}}}
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(RUN)
    return tmp_path / "run.yaml"


def cli(run: Path, *words: str, **kwargs: Any) -> LightningCLI:
    return LightningCLI(args=["--config", str(run), *words], run=False, **kwargs)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that is said."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as info:
        main(words)
    assert info.value.code == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith(f"trainyard {words[0]}: error: ")
    assert not [x for x in out.splitlines() if not x.startswith("Seed set")]
    return line.partition("error: ")[2]


# ---- configurations


def test_objects_are_made_as_the_configuration_says(run: Path) -> None:
    made = cli(run)
    assert isinstance(made.model, Net)
    assert isinstance(made.datamodule, Data)
    assert made.model.hparams == {
        "lr": 1e-3, "activation": Activation.GELU, "sizes": Sizes(8), "name": "net", "tags": None, "mode": "a", "folder": None
    }  # fmt: skip
    assert made.trainer.max_epochs == 1
    assert isinstance(made.trainer.logger, CSVLogger)
    (stopping,) = [c for c in made.trainer.callbacks if isinstance(c, EarlyStopping)]
    assert stopping.monitor == "val"
    assert made.config.model.init_args.sizes.width == 8
    assert os.environ["PL_GLOBAL_SEED"] == "7"


def test_overrides(run: Path) -> None:
    model = cli(
        run, "--model.lr=0.5", "--model.init_args.name", "12", "--model.sizes.depth", "3", "--model.tags", "[x, y]",
        "--model.folder", "a/b", "--model.mode", "b", "--data.batch_size", "8",
    )  # fmt: skip
    assert model.model.hparams == {
        "lr": 0.5, "activation": Activation.GELU, "sizes": Sizes(8, 3), "name": "12", "tags": ["x", "y"], "mode": "b",
        "folder": Path("a/b"),
    }  # fmt: skip
    assert model.datamodule.hparams.batch_size == 8
    trainer = cli(
        run, "--trainer.callbacks+=Timer", "--trainer.callbacks.interval=epoch", "--trainer.callbacks.0.patience=9",
        "--trainer.gradient_clip_val", "1e-1", "--trainer.deterministic", "warn", "--trainer.fast_dev_run",
        "--trainer.max_time", "00:00:01:00", "--trainer.limit_val_batches", "2", "--trainer.logger.name=x",
    ).trainer  # fmt: skip
    torch.use_deterministic_algorithms(False)
    by_type = {type(c): c for c in trainer.callbacks}
    assert by_type[EarlyStopping].patience == 9
    assert by_type[Timer]
    assert (trainer.gradient_clip_val, trainer.fast_dev_run) == (0.1, True)


def test_files_are_merged_and_the_last_one_counts(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(
        "model: {init_args: {lr: 2, sizes: {depth: 4}}}\ntrainer: {max_epochs: 3, callbacks: null}\n"
    )
    made = cli(run, "--config", str(other), "--trainer.max_epochs=5")
    assert (made.model.hparams.lr, made.model.hparams.sizes) == (2.0, Sizes(8, 4))
    assert made.trainer.max_epochs == 5
    assert not [c for c in made.trainer.callbacks if isinstance(c, EarlyStopping)]
    other.write_text(f"model: {{class_path: {HERE}.Deep, init_args: {{levels: 2, lr: 3}}}}\n")
    deep = cli(run, "--config", str(other)).model
    assert isinstance(deep, Deep)
    assert (deep.levels, deep.hparams.lr, deep.hparams.sizes) == (2, 3.0, None), (
        "no argument of the other class stays"
    )


def test_classes_within_arguments(run: Path) -> None:
    made = cli(
        run, "--model.loss", "HuberLoss", "--model.loss.delta", "2", "--model.make_optimizer",
        "{class_path: Adam, init_args: {weight_decay: 0.1}}", "--model.rider=trainyard.pytorch.callbacks.Timer",
    ).model  # fmt: skip
    assert isinstance(made.loss, torch.nn.HuberLoss)
    assert made.loss.delta == 2.0
    assert isinstance(made.rider, Timer)
    optimizer = made.configure_optimizers()
    assert isinstance(optimizer, torch.optim.Adam)
    assert (optimizer.defaults["weight_decay"], optimizer.defaults["lr"]) == (0.1, 1e-3)
    assert isinstance(cli(run, "--model.rider", "lightning.pytorch.callbacks.Timer").model.rider, Timer), (
        "import paths of Lightning's"
    )


def test_optimizer_and_scheduler_sections(run: Path) -> None:
    made = cli(
        run,
        "--optimizer",
        "AdamW",
        "--optimizer.lr=0.3",
        "--lr_scheduler=StepLR",
        "--lr_scheduler.step_size=2",
    )
    (optimizer,), (scheduler,) = made.model.configure_optimizers()
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (optimizer.defaults["lr"], scheduler.step_size) == (0.3, 2)
    plateau = cli(
        run, "--optimizer", "SGD", "--lr_scheduler", "ReduceLROnPlateau", "--lr_scheduler.monitor", "val",
        "--lr_scheduler.interval", "epoch", "--lr_scheduler.patience", "1",
    )  # fmt: skip
    plateau.trainer.fit(plateau.model, plateau.datamodule)
    (config,) = plateau.trainer.lr_scheduler_configs
    assert (config.monitor, config.scheduler.patience, config.reduce_on_plateau) == ("val", 1, True)


def test_a_printed_configuration_says_everything(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def printed(*words: str) -> str:
        with pytest.raises(SystemExit) as info:
            main(["fit", *words, "--print_config"])
        assert info.value.code == 0
        return capsys.readouterr().out

    first = printed("--config", str(run), "--model.make_optimizer", "{class_path: Adam, init_args: {lr: 3}}")
    config = parse(first)
    assert config["model"]["init_args"]["sizes"] == {"width": 8, "depth": 1}
    assert config["model"]["init_args"]["make_optimizer"]["init_args"]["lr"] == 3.0
    assert config["trainer"]["accumulate_grad_batches"] == 1
    assert config["trainer"]["callbacks"][0]["init_args"]["patience"] == 3
    (tmp_path / "whole.yaml").write_text(first)
    assert printed("--config", str(tmp_path / "whole.yaml")) == first


# ---- what is wrong


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model.lrr", "3"], "model.lrr: Net has no 'lrr'; the nearest is 'lr'"),
        (["--trainer.max_epoch=3"], "trainer.max_epoch: Trainer has no 'max_epoch'; the nearest is 'max_epochs'"),
        (["--trainer.max_epochs", "three"], "trainer.max_epochs: 'three' is no int | None"),
        (["--trainer.max_epochs", "true"], "trainer.max_epochs: True is no int | None"),
        (["--model.activation", "TANH"], "model.activation: 'TANH' is none of RELU, GELU"),
        (["--model.mode", "c"], "model.mode: 'c' is none of 'a', 'b'"),
        (["--model.sizes.widht=3"], "model.sizes.widht: Sizes has no 'widht'; the nearest is 'width'"),
        (["--model.sizes.depth=0"], "model.sizes: depth is less than 1"),
        (["--model.tags", "x"], "model.tags: 'x' is no list[str] | None"),
        (["--model.tags", "[1]"], "model.tags[0]: 1 is no str"),
        (["--model", f"{HERE}.Nett"], f"model.class_path: {HERE}.Nett: module {HERE} has no 'Nett'; the nearest is 'Net'"),
        (["--model", "nowhere.Net"], "model.class_path: nowhere.Net: there is no module 'nowhere'"),
        (["--model", f"{HERE}.Data"], f"model.class_path: {HERE}.Data is no LightningModule"),
        (["--model", f"{HERE}.Deep"], "model: Deep needs levels"),
        (["--trainer.callbacks+=EarlyStoping"],
         "trainer.callbacks[1]: there is no Callback 'EarlyStoping'; the nearest is 'EarlyStopping'"),
        (["--trainer.callbacks+=EarlyStopping"], "trainer.callbacks[1]: EarlyStopping needs monitor"),
        (["--trainer.logger.save_dri=x"], "trainer.logger.save_dri: CSVLogger has no 'save_dri'; the nearest is 'save_dir'"),
        (["--modle.lr", "3"], "--modle.lr: no such argument; the nearest is '--model'"),
        (["--config", "none.yaml"], "--config: none.yaml does not exist"),
        (["--config", "bad.yaml"], "--config: bad.yaml, line 2, column "),
        (["--config", "twice.yaml"], "--config: twice.yaml, line 3, column 1: key 'model' stands twice"),
        (["--config", "names.yaml"], "--config: names.yaml: there is no section 'modell'; the nearest is 'model'"),
        (["--lr_scheduler", "StepLR", "--lr_scheduler.step_size=1"], "lr_scheduler: a scheduler needs an optimizer section"),
        (["--trainer.precision", "12"], "precision: 12 is none of"),
        (["word"], "'word': an argument is --name value, as --trainer.max_epochs 3"),
    ],
)  # fmt: skip
def test_errors_are_one_line_with_the_place(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    (tmp_path / "bad.yaml").write_text("model: [\ntrainer: {")
    (tmp_path / "twice.yaml").write_text("model: {}\ntrainer: {}\nmodel: {}\n")
    (tmp_path / "names.yaml").write_text("modell: {}\n")
    assert refused(capsys, "fit", "--config", str(run), *words).startswith(said)


def test_more_errors(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused(capsys, "fit").startswith(
        "model: say which: model.class_path in a configuration, or --model"
    )
    assert refused(capsys, "export", "--config", str(run)) == "--ckpt_path is missing"
    assert main(["fti"]) == 2
    assert capsys.readouterr().err == "trainyard: error: there is no 'fti'; the nearest is 'fit'\n"
    monkeypatch.setenv("TRAINYARD_RUN_UID", "u")
    with pytest.raises(SystemExit) as info:
        main(["fit"])
    assert info.value.code == 78, "a restart would not help"


# ---- help


def test_help_without_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from trainyard.cli.main import main; main(['--help']); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    *lines, torch_too = done.stdout.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == [
        "fit",
        "validate",
        "test",
        "predict",
        "export",
        "checkpoints",
    ]
    assert torch_too == "False"


def test_help_lists_the_arguments_of_the_chosen_classes(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*words: str) -> str:
        with pytest.raises(SystemExit) as info:
            main(words)
        assert info.value.code == 0
        return " ".join(capsys.readouterr().out.split())

    bare = said("fit", "--help")
    assert "--model CLASS (a LightningModule, required)" in bare
    assert "--trainer.accumulate_grad_batches (int, default: 1) batches for each optimizer step" in bare
    assert "--model.lr" not in bare
    chosen = said("fit", "--config", str(run), "--help")
    assert "--model.lr (float, default: 0.1) Learning rate." in chosen
    assert "--model.activation (Activation, default: RELU) What stands between the layers." in chosen
    assert "--data.batch_size (int, default: 4)" in chosen
    deep = said("validate", "--model", f"{HERE}.Deep", "--help")
    assert "--model.levels (int, required)" in deep
    assert "--model.sizes (Sizes | None, default: null) How large it is." in deep


def test_every_argument_of_the_trainer_has_words() -> None:
    from trainyard.cli.trainer_words import WORDS
    from trainyard.utilities.hints import parameters_of

    assert set(WORDS) == {p.name for p in parameters_of(L.Trainer)}


# ---- the verbs


def test_a_run_from_end_to_end(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """fit saves its configuration; the others, and a second fit, take it and the checkpoint."""
    assert main(["fit", "--config", str(run), "--model.lr", "0.05"]) == 0
    version = tmp_path / "logs" / "lightning_logs" / "version_0"
    (checkpoint,) = (version / "checkpoints").glob("*.ckpt")
    saved = version / "config.yaml"
    assert parse(saved.read_text())["model"]["init_args"]["lr"] == 0.05
    capsys.readouterr()
    for verb in ("validate", "test", "predict"):
        assert main([verb, "--config", str(saved), "--ckpt_path", str(checkpoint)]) == 0
        assert f"loaded {checkpoint}" in capsys.readouterr().out
    assert (
        main(["fit", "--config", str(saved), "--ckpt_path", str(checkpoint), "--trainer.max_epochs=2"]) == 0
    )
    (second,) = tmp_path.glob("logs/lightning_logs/version_*/checkpoints/epoch=1*.ckpt")
    assert torch.load(second, weights_only=True)["global_step"] == 8
    output = tmp_path / "net.safetensors"
    assert main(["export", "--config", str(saved), "--ckpt_path", str(second), "--output", str(output)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(output)
    from safetensors.torch import load_file

    weights = torch.load(second, weights_only=True)["state_dict"]
    assert torch.equal(load_file(output)["net.weight"], weights["net.weight"])
    words = ["--config", str(saved), "--ckpt_path", str(second), "--output", "net.zip"]
    assert refused(capsys, "export", *words).startswith("path: no format is known by the suffix '.zip'")


def test_sections_by_verb_in_one_file(run: Path, tmp_path: Path) -> None:
    lines = "\n".join(f"  {line}" for line in RUN.strip().splitlines())
    (tmp_path / "verbs.yaml").write_text(f"fit:\n{lines}\nvalidate:\n  trainer: {{max_epochs: 9}}\n")
    assert main(["fit", "--config", str(tmp_path / "verbs.yaml"), "--trainer.fast_dev_run=true"]) == 0


def test_under_torchrun(run: Path, tmp_path: Path, host: Host) -> None:
    script = tmp_path / "cli.py"
    script.write_text("import sys\nfrom trainyard.cli.main import main\nsys.exit(main())\n")
    words = ["fit", "--config", str(run), "--trainer.devices", "2", f"--trainer.default_root_dir={tmp_path}"]
    ranks = host.run(
        [str(script), *words, f"--trainer.logger.save_dir={tmp_path / 'logs'}"],
        world=2,
        env={"PWD": str(tmp_path)},
    )
    assert [rank.code for rank in ranks] == [0, 0], ranks[0].output + ranks[1].output
    assert len(list(tmp_path.glob("logs/lightning_logs/*/config.yaml"))) == 1


def test_python_m_trainyard_finds_modules_in_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(f"from {HERE} import Data, Net\nclass Mine(Net): pass\n")
    (tmp_path / "run.yaml").write_text(
        "model: mine.Mine\ndata: mine.Data\ntrainer: {fast_dev_run: true, accelerator: cpu}\n"
    )
    command = [sys.executable, "-P", "-m", "trainyard", "fit", "--config", "run.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


# ---- LightningCLI


def test_fixed_classes(run: Path, tmp_path: Path) -> None:
    made = LightningCLI(
        Net, Data, args=["fit", "--model.lr=0.2", "--data.count", "8", "--trainer.fast_dev_run=1"],
        trainer_defaults={"accelerator": "cpu", "max_epochs": 3}, seed_everything_default=3,
    )  # fmt: skip
    assert (made.model.hparams.lr, made.datamodule.hparams.count, made.trainer.fast_dev_run) == (0.2, 8, 1)
    assert made.trainer.global_step == 1
    assert made.config.seed_everything == 3
    assert made.result is None


def test_arguments_as_a_dict(run: Path) -> None:
    given = {"model": {"lr": 0.2}, "trainer": {"accelerator": "cpu", "fast_dev_run": True, "logger": False}}
    made = LightningCLI(Net, Data, args={"subcommand": "test", "test": given})
    assert made.model.hparams.lr == 0.2
    assert [sorted(found) for found in made.result] == [["test"]]
    assert LightningCLI(Net, Data, args=given, run=False).model.hparams.lr == 0.2


def test_a_cli_of_the_users_own(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Own(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_lightning_class_args(EarlyStopping, "stopping")
            parser.add_optimizer_args(torch.optim.Adam)
            parser.set_defaults({"stopping.monitor": "val", "optimizer.lr": 0.07})
            parser.add_argument("--factor", type=int, default=2, help="Of the batch size")
            parser.link_arguments("data.batch_size", "model.name", compute_fn=lambda size: f"b{size}")
            parser.link_arguments(
                "data.features", "model.lr", compute_fn=lambda n: n / 8, apply_on="instantiate"
            )

        @staticmethod
        def configure_optimizers(lightning_module: Any, optimizer: Any, lr_scheduler: Any = None) -> Any:
            return {"optimizer": optimizer}

        def before_fit(self) -> None:
            self.told = ["before"]

        def after_fit(self) -> None:
            self.told.append("after")

    words = [
        "--stopping.patience=7",
        "--factor",
        "5",
        "--data.batch_size",
        "2",
        "--trainer.fast_dev_run=true",
    ]
    made = Own(
        Net, Data, args=["fit", *words], trainer_defaults={"accelerator": "cpu", "callbacks": [Timer()]}
    )
    (stopping,) = [c for c in made.trainer.callbacks if isinstance(c, EarlyStopping)]
    assert (stopping.patience, stopping.monitor, made.config.factor) == (7, "val", 5)
    assert any(isinstance(c, Timer) for c in made.trainer.callbacks)
    assert (made.model.hparams.name, made.model.hparams.lr) == ("b2", 0.5)
    assert isinstance(made.trainer.optimizers[0], torch.optim.Adam)
    assert made.trainer.optimizers[0].defaults["lr"] == 0.07
    assert made.told == ["before", "after"]
    with pytest.raises(SystemExit):
        Own(Net, Data, args=["fit", "--factor", "many"])
    assert "error: factor: 'many' is no int" in capsys.readouterr().err


def test_saved_configurations_are_not_lost(run: Path, tmp_path: Path) -> None:
    def save(config: dict[str, Any], **kwargs: Any) -> list[str]:
        callback = SaveConfigCallback(None, config, **kwargs)
        callback._write(tmp_path / "log")
        return sorted(p.name for p in (tmp_path / "log").iterdir())

    assert save({"a": 1}) == ["config.yaml"]
    assert save({"a": 1}) == ["config.yaml"], "a run that goes on"
    assert save({"a": 2}) == ["config-1.yaml", "config.yaml"]
    assert save({"a": 2}) == ["config-1.yaml", "config.yaml"]
    assert save({"a": 3}, overwrite=True) == ["config-1.yaml", "config.yaml"]
    assert parse((tmp_path / "log" / "config.yaml").read_text()) == {"a": 3}
