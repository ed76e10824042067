"""Exported files give what the module gives, the module is left as it was, and what cannot be exported is told."""

from __future__ import annotations

import io
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import trainyard as L
from tests.trainer import models
from trainyard.errors import MisconfigurationException
from trainyard.export import ExportError, export, format_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Net(L.LightningModule):
    """Everything that differs between training and evaluation, and a part that stays in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.BatchNorm1d(3)
        self.frozen.eval()
        for norm in (self.norm, self.frozen):
            nn.init.normal_(norm.running_mean)
        self.example_input_array: Any = torch.randn(1, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.frozen(self.dropout(self.norm(self.layer(x)))).softmax(-1)


class TwoInputs(Net):
    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return super().forward(left - 2 * right)


class DictInput(Net):
    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"scores": super().forward(batch["a"] - 2 * batch["b"])}


def eager(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    modes = [(each, each.training) for each in module.modules()]
    module.eval()
    with torch.no_grad():
        out = module(*args, **kwargs)
    for each, training in modes:
        each.training = training
    return out


def ran(model: str | bytes, *inputs: torch.Tensor) -> torch.Tensor:
    """The first output of an ONNX model, by onnxruntime."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    feed = {each.name: value.numpy() for each, value in zip(session.get_inputs(), inputs, strict=True)}
    (output, *_) = session.run(None, feed)
    return torch.from_numpy(np.asarray(output))


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def leftovers(folder: Path, *expected: str) -> None:
    assert sorted(each.name for each in folder.iterdir()) == sorted(expected)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(5)
    return Net()


# ONNX


def test_onnx_answers_as_the_module_in_evaluation_mode_for_any_batch(net: Net, tmp_path: Path) -> None:
    path = tmp_path / "new" / "net.onnx"
    program = net.to_onnx(path, dynamic_shapes="batch")
    assert isinstance(program, torch.onnx.ONNXProgram)
    for size in (1, 2, 7):
        inputs = torch.randn(size, 4)
        close(ran(str(path), inputs), eager(net, inputs))
    onnx.checker.check_model(str(path), full_check=True)
    leftovers(path.parent, "net.onnx")


def test_every_submodule_keeps_its_mode(net: Net, tmp_path: Path) -> None:
    before = [each.training for each in net.modules()]
    assert True in before and False in before
    state = {name: value.clone() for name, value in net.state_dict().items()}
    net.to_onnx(tmp_path / "a.onnx")
    net.to_torchscript(tmp_path / "a.pt")
    net.to_torchscript(method="trace")
    net.to_exported_program(tmp_path / "a.pt2")
    with pytest.raises(ExportError):
        net.to_onnx(tmp_path / "b.onnx", input_sample=torch.randn(2, 5))
    assert [each.training for each in net.modules()] == before
    close(net.state_dict(), state)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("kind", ["path", "text", "buffer", "none"])
def test_onnx_goes_where_it_is_told(net: Net, tmp_path: Path, kind: str) -> None:
    path, buffer = tmp_path / "net.onnx", io.BytesIO()
    program = net.to_onnx({"path": path, "text": str(path), "buffer": buffer, "none": None}[kind])
    assert program is not None
    model = {"buffer": buffer.getvalue(), "none": program.model_proto.SerializeToString()}.get(
        kind, str(path)
    )
    close(ran(model, net.example_input_array), eager(net, net.example_input_array))
    assert path.exists() == (kind in ("path", "text"))


def test_weights_beside_the_model_move_with_it(net: Net, tmp_path: Path) -> None:
    net.layer = nn.Linear(4096, 3)
    sample = torch.randn(2, 4096)
    path = tmp_path / "net.onnx"
    path.write_bytes(b"an old model")
    net.to_onnx(path, sample, external_data=True)
    leftovers(tmp_path, "net.onnx", "net.onnx.data")
    assert (tmp_path / "net.onnx.data").stat().st_size >= 4096 * 3 * 4
    close(ran(str(path), sample), eager(net, sample))
    with pytest.raises(ExportError, match="need a file's path"):
        net.to_onnx(io.BytesIO(), sample, external_data=True)


def test_dynamic_shapes_and_the_older_dynamic_axes(net: Net, tmp_path: Path) -> None:
    sample = torch.randn(3, 4)
    for name, options in {
        "shapes": {"dynamic_shapes": ({0: "n"},)},
        "dims": {"dynamic_shapes": {"x": {0: torch.export.Dim("n")}}},
        "axes": {"dynamic_axes": {"x": {0: "n"}, "y": {0: "n"}}, "output_names": ["y"]},
        "list": {"dynamic_axes": {"data": [0]}, "input_names": ["data"]},
    }.items():
        path = tmp_path / f"{name}.onnx"
        net.to_onnx(path, sample, **options)
        close(ran(str(path), torch.ones(6, 4)), eager(net, torch.ones(6, 4)))
    net.to_onnx(tmp_path / "static.onnx", sample)
    with pytest.raises(Exception, match=r"(?s)dimension.*Got: 6"):
        ran(str(tmp_path / "static.onnx"), torch.ones(6, 4))
    with pytest.raises(ExportError, match="dynamic_shapes or dynamic_axes, not both"):
        net.to_onnx(None, sample, dynamic_axes={"x": [0]}, dynamic_shapes="batch")


def test_samples_are_tensors_tuples_and_dicts(tmp_path: Path) -> None:
    left, right = torch.randn(2, 4), torch.randn(2, 4)
    for index, sample in enumerate([(left, right), [left, right], {"right": right, "left": left}]):
        module = TwoInputs()
        module.example_input_array = sample
        path = tmp_path / f"{index}.onnx"
        module.to_onnx(path, dynamic_shapes="batch")
        session = onnxruntime.InferenceSession(str(path))
        feed = {"left": left[:1].numpy(), "right": right[:1].numpy()}
        assert {each.name for each in session.get_inputs()} == set(feed)
        close(torch.from_numpy(session.run(None, feed)[0]), eager(module, left[:1], right[:1]))

    batch = {"a": left, "b": right}
    module = DictInput()
    module.to_onnx(tmp_path / "dict.onnx", batch)
    close(ran(str(tmp_path / "dict.onnx"), left, right), eager(module, batch)["scores"])
    program = module.to_exported_program(tmp_path / "dict.pt2", batch, dynamic_shapes="batch")
    longer = {name: torch.randn(5, 4) for name in batch}
    close(program.module()(longer), eager(module, longer))


def test_the_exporter_on_torchscript_is_still_there(net: Net, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    axes = {"x": {0: "n"}}
    assert net.to_onnx(path, dynamo=False, input_names=["x"], dynamic_axes=axes) is None
    close(ran(str(path), torch.ones(3, 4)), eager(net, torch.ones(3, 4)))
    with pytest.raises(ExportError, match="give file_path"):
        net.to_onnx(dynamo=False)


# The example, and the hooks that it goes through


class Scaled(Net):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch.float() / 16


def test_the_example_goes_through_the_hooks_of_the_batch(tmp_path: Path) -> None:
    module = Scaled()
    raw = torch.randint(0, 16, (2, 4))
    module.to_onnx(tmp_path / "a.onnx", (raw, torch.zeros(2)), dynamic_shapes="batch")
    close(ran(str(tmp_path / "a.onnx"), raw.float() / 16), eager(module, raw.float() / 16))
    module.to_torchscript(tmp_path / "a.pt", "trace", (raw, torch.zeros(2)))
    close(torch.jit.load(tmp_path / "a.pt")(raw.float() / 16), eager(module, raw.float() / 16))
    with pytest.raises(ExportError, match="on_before_batch_transfer cannot take the example"):
        module.to_onnx(None, 3)


def test_after_a_fit_the_hooks_are_the_data_modules(tmp_path: Path) -> None:
    class Data(L.LightningDataModule):
        def train_dataloader(self) -> Any:
            return models.loader()

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [each * 2 for each in batch] if isinstance(batch, list) else batch * 2

    class Module(models.Regression):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert x.shape[1] == 4
            self.seen = x.detach()
            return self.net(x)

    module, trainer = Module(), models.trainer(max_steps=2)
    trainer.fit(module, datamodule=Data())
    module.to_torchscript(tmp_path / "a.pt", "trace", torch.ones(2, 4))
    assert module.seen.tolist() == torch.full((2, 4), 2.0).tolist()
    del module.seen
    # With its trainer still attached, by each of the ways:
    inputs = torch.randn(3, 4)
    close(torch.jit.load(tmp_path / "a.pt")(inputs), eager(module, inputs))
    Module.forward = lambda self, x: self.net(x)  # type: ignore[method-assign]
    close(module.to_exported_program(None, inputs).module()(inputs * 1), eager(module, inputs))
    module.to_onnx(tmp_path / "a.onnx", inputs)
    close(ran(str(tmp_path / "a.onnx"), inputs), eager(module, inputs))


# TorchScript


class WithTrainer(Net):
    """Asks in a property, and in hooks that are not exported, for what only a trainer has."""

    @property
    def progress(self) -> float:
        return self.current_epoch / 10

    def on_train_start(self) -> None:
        print(self.trainer.max_epochs)


@pytest.mark.parametrize("method", ["script", "trace"])
def test_torchscript_is_saved_and_loaded(net: Net, tmp_path: Path, method: str) -> None:
    scripted = net.to_torchscript(tmp_path / "net.pt", method=method)
    assert isinstance(scripted, torch.jit.ScriptModule)
    inputs = torch.randn(5, 4)
    loaded = torch.jit.load(tmp_path / "net.pt")
    assert not loaded.training
    close(loaded(inputs), eager(net, inputs))
    leftovers(tmp_path, "net.pt")


def test_modules_in_modules_are_scripted_before_during_and_after_a_fit(tmp_path: Path) -> None:
    class Outer(models.Regression):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Net()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(self.net(x).expand(-1, 4))

        def on_train_end(self) -> None:
            self.to_torchscript(tmp_path / "during.pt")

    module = Outer()
    module.to_torchscript(tmp_path / "before.pt")
    models.trainer(max_steps=1).fit(module, models.loader())
    trainer = module.trainer
    module.to_torchscript(tmp_path / "after.pt")
    assert module.trainer is trainer
    inputs = torch.randn(3, 4)
    for name in ("during", "after"):
        close(torch.jit.load(tmp_path / f"{name}.pt")(inputs), eager(module, inputs))


def test_torchscript_warns_once_and_names_its_successor(net: Net, tmp_path: Path) -> None:
    for method in ("script", "trace"):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            net.to_torchscript(tmp_path / "net.pt", method=method)
        (only,) = told
        assert only.category is DeprecationWarning and "to_exported_program" in str(only.message)
        assert only.filename == __file__


def test_properties_of_subclasses_may_be_left_out_too(net: Net) -> None:
    class Own(WithTrainer):
        __jit_unused_properties__ = ["progress"]  # noqa: RUF012 - torch's own form

    assert {"trainer", "device", "logger", "progress"} <= set(Own.__jit_unused_properties__)
    assert "progress" not in Net.__jit_unused_properties__
    close(Own().to_torchscript()(torch.ones(2, 4)).shape, torch.Size([2, 3]))


# torch.export


def test_an_exported_program_needs_no_code_of_the_module(net: Net, tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    net.to_exported_program(path, dynamic_shapes="batch")
    inputs = torch.randn(5, 4)
    torch.save({"inputs": inputs, "expected": eager(net, inputs)}, tmp_path / "case.pth")
    code = (
        "import sys, torch; case = torch.load(sys.argv[2]);"
        "found = torch.export.load(sys.argv[1]).module()(case['inputs']);"
        "torch.testing.assert_close(found, case['expected']); assert 'trainyard' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code, path, tmp_path / "case.pth"], check=True, timeout=120, cwd=tmp_path
    )


def test_names_of_dimensions_and_other_than_batch(net: Net, tmp_path: Path) -> None:
    module = TwoInputs()
    sample = (torch.randn(3, 4), torch.randn(3, 4))
    program = module.to_exported_program(None, sample, dynamic_shapes=({0: "n"}, {0: "n"}))
    longer = (torch.randn(9, 4), torch.randn(9, 4))
    close(program.module()(*longer), eager(module, *longer))
    with pytest.raises(ExportError, match="same first size"):
        module.to_exported_program(None, (torch.randn(3, 4), torch.randn(1, 4)), dynamic_shapes="batch")


def test_a_program_that_answers_otherwise_is_not_put_in_place(tmp_path: Path) -> None:
    calls = iter(range(1, 100))

    class Counting(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) * next(calls)

    (tmp_path / "net.pt2").write_bytes(b"the last good one")
    with pytest.raises(ExportError, match="gives other results than its forward"):
        Counting().to_exported_program(tmp_path / "net.pt2")
    assert (tmp_path / "net.pt2").read_bytes() == b"the last good one"
    leftovers(tmp_path, "net.pt2")


def test_an_example_that_forward_cannot_take_is_told_from_a_forward_that_cannot_be_traced(
    tmp_path: Path,
) -> None:
    sample = torch.zeros(2, 4, dtype=torch.uint8)  # torch.export lets it pass
    with pytest.raises(ExportError, match=r"(?s)Net.forward fails with the example.*dtype.*self\.layer\(x\)"):
        Net().to_exported_program(tmp_path / "net.pt2", sample)
    leftovers(tmp_path)


# Refusals


class Branching(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return self.layer(x)
        return self.norm(self.layer(x))


class Variadic(Net):
    def forward(self, *x: torch.Tensor) -> torch.Tensor:
        return self.layer(x[0])


@pytest.mark.parametrize("how", ["to_onnx", "to_exported_program"])
def test_a_forward_that_cannot_be_traced_is_shown_with_its_line(how: str, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    with pytest.raises(ExportError) as told:
        getattr(Branching(), how)(path)
    text = str(told.value)
    assert "Branching.forward" in text and "if x.sum() > 0" in text and "torch.cond" in text
    assert len(text) < 2000
    assert isinstance(told.value, MisconfigurationException) and isinstance(told.value, ValueError)
    assert told.value.__cause__ is not None
    leftovers(tmp_path)


def test_torchscript_that_cannot_be_compiled_names_the_other_ways() -> None:
    with pytest.raises(ExportError, match=r"(?s)Variadic\.forward.*method='trace'.*to_exported_program"):
        Variadic().to_torchscript()
    with pytest.raises(ExportError, match="method is 'script' or 'trace', not 'compile'"):
        Net().to_torchscript(method="compile")


def test_without_an_example_the_message_says_how_to_give_one() -> None:
    net = Net()
    net.example_input_array = None
    for call, argument in (
        (net.to_onnx, "input_sample"),
        (net.to_exported_program, "input_sample"),
        (lambda: net.to_torchscript(method="trace"), "example_inputs"),
    ):
        with pytest.raises(ExportError, match=f"(?s){argument}=.*self.example_input_array in Net"):
            call()
    net.to_torchscript()  # needs none


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "safetensors"])
def test_a_missing_extra_is_named(
    net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=r"trainyard\[export\]"):
        net.to_safetensors(tmp_path / "a") if package == "safetensors" else net.to_onnx(tmp_path / "a.onnx")
    leftovers(tmp_path)


def test_paths_that_are_no_files_are_refused(net: Net, tmp_path: Path) -> None:
    for path in ("s3://bucket/net.onnx", tmp_path):
        for write in (net.to_onnx, net.to_torchscript, net.to_exported_program, net.to_safetensors):
            with pytest.raises(ExportError, match=r"is a URL|is a folder"):
                write(path)


# One function for all


@pytest.mark.parametrize("name", ["net.onnx", "net.pt", "net.ts", "net.pt2", "net.safetensors", "net.pth"])
def test_the_suffix_says_the_format(net: Net, tmp_path: Path, name: str) -> None:
    path = export(net, tmp_path / name)
    inputs = net.example_input_array
    format = format_of(path)
    if format == "onnx":
        found = ran(str(path), inputs)
    elif format == "torchscript":
        found = torch.jit.load(path)(inputs)
    elif format == "pt2":
        found = torch.export.load(path).module()(inputs)
    else:
        other = Net()
        if format == "safetensors":
            other.load_safetensors(path)
        else:
            other.load_state_dict(torch.load(path, weights_only=True))
        found = eager(other, inputs)
    close(found, eager(net, inputs))
    leftovers(tmp_path, name)


def test_formats_and_options_that_are_none_are_refused_before_any_work(net: Net, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"suffix '\.xyz'.*onnx, torchscript, pt2, safetensors, state_dict"):
        export(net, tmp_path / "net.xyz")
    with pytest.raises(ExportError, match="format: 'tflite' is none of"):
        export(net, tmp_path / "net.onnx", "tflite")
    with pytest.raises(ExportError, match="format 'safetensors' has no option 'opset_version'"):
        export(net, tmp_path / "net.safetensors", opset_version=18)
    assert export(net, tmp_path / "weights", "safetensors").exists()
