"""The serving example, by its own commands: train, export, three servers, all of which answer as trainer.predict does."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils.data import DataLoader

import trainyard as L
from devcluster import torchserve
from devcluster.ports import free_ports
from tests.trainer.serving import EXAMPLE, SECONDS, environment, request, server
from trainyard.data.inference import predict_batches, prepare_batch


class Served(NamedTuple):
    """What train.py and export.py left, and what is to be expected of it."""

    folder: Path
    images: list[Any]
    labels: torch.Tensor
    probabilities: torch.Tensor
    """Of trainer.predict, (n, 10)."""


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=environment(), capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def example() -> Iterator[Any]:
    """The example's module, as its scripts import it."""
    sys.path.insert(0, str(EXAMPLE))
    try:
        import digits_model  # type: ignore[import-not-found]

        yield digits_model
    finally:
        sys.path.remove(str(EXAMPLE))
        sys.modules.pop("digits_model", None)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, example: Any) -> Served:
    folder = tmp_path_factory.mktemp("digits")
    run(EXAMPLE / "train.py", "--output", folder, "--epochs", 4, cwd=folder)
    told = run(EXAMPLE / "export.py", folder / "digits.ckpt", "--output", folder / "served", cwd=folder)
    assert told.split() == ["model.onnx", "model.pt", "model.pt2", "preprocessing.json"]

    data = example.DigitsData.load_from_checkpoint(folder / "digits.ckpt")
    trainer = L.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu")
    logits = trainer.predict(
        example.DigitsClassifier.load_from_checkpoint(folder / "digits.ckpt"), datamodule=data
    )
    images, labels = data.validation.tensors
    return Served(folder / "served", images.tolist(), labels, torch.cat(logits).softmax(1))


def agrees(served: Served, predictions: list[Any], first: int = 0) -> None:
    """Answers for the images from `first` on."""
    expected = served.probabilities[first : first + len(predictions)]
    found = torch.tensor([each["probabilities"] for each in predictions])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert [each["digit"] for each in predictions] == expected.argmax(1).tolist()


def test_what_is_served_knows_digits(served: Served) -> None:
    assert (served.probabilities.argmax(1) == served.labels).float().mean() > 0.9


BAD = {
    "no list": {"images": "zero"},
    "none": {"images": []},
    "too many": {"images": [[[0] * 8] * 8] * 257},
    "a row too few": {"images": [[[0] * 8] * 7]},
    "too dark": {"images": [[[17] + [0] * 7] + [[0] * 8] * 7]},
    "no whole number": {"images": [[[0.5] + [0] * 7] + [[0] * 8] * 7]},
    "another name": {"pictures": []},
}


def check(url: str, served: Served, refusal: int) -> None:
    """One image, many images, several clients at once; and mistakes, after which the server still answers."""
    for count in (1, 7, 200):
        answer = request(url, {"images": served.images[:count]})
        assert answer.status == 200, answer
        assert len(answer.body["predictions"]) == count
        agrees(served, answer.body["predictions"])
    for what, body in BAD.items():
        answer = request(url, body)
        assert answer.status == refusal, (what, answer)
        assert "image" in str(answer.body) and len(str(answer.body)) < 2000, (what, answer)
    assert request(url, raw=b"{no json").status == refusal
    assert request(url, raw=b"[" * 100_000).status in (400, refusal)
    with ThreadPoolExecutor(8) as clients:
        asked = [clients.submit(request, url, {"images": [each]}) for each in served.images[:24]]
        for number, each in enumerate(asked):
            agrees(served, each.result(SECONDS).body["predictions"], number)


def test_fastapi(served: Served, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    base = f"http://127.0.0.1:{port}"
    command = [
        sys.executable,
        "-m",
        "uvicorn",
        "--factory",
        "fastapi_app:create_app",
        "--app-dir",
        EXAMPLE,
        "--port",
        port,
    ]
    env = environment(DIGITS=served.folder)
    with server(command, f"{base}/health", tmp_path / "log", env=env, cwd=tmp_path):
        check(f"{base}/predict", served, 422)
        assert request(f"{base}/openapi.json").body["info"]["title"] == "Digits"


def test_flask(served: Served, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    base = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "flask", "--app", EXAMPLE / "flask_app", "run", "--port", port]
    env = environment(DIGITS=served.folder)
    with server(command, f"{base}/health", tmp_path / "log", env=env, cwd=tmp_path):
        check(f"{base}/predict", served, 400)
        assert request(f"{base}/predict", raw=b" " * (1 << 21)).status == 413
        assert request(f"{base}/nowhere").body["error"]


# TorchServe

PROPERTIES = """\
inference_address=http://127.0.0.1:{}
management_address=http://127.0.0.1:{}
metrics_address=http://127.0.0.1:{}
grpc_inference_port={}
grpc_management_port={}
default_workers_per_model=1
disable_system_metrics=true
vmargs=-Xmx256m
"""


@pytest.fixture(scope="module")
def serve() -> Path:
    """TorchServe's programs."""
    if reason := torchserve.obstacle():
        pytest.skip(reason)
    return torchserve.ensure() / "bin"


@contextlib.contextmanager
def running(serve: Path, store: Path, folder: Path) -> Iterator[tuple[str, str]]:
    """A real TorchServe with nothing loaded: its inference and management addresses."""
    ports = free_ports(5)
    (folder / "tmp").mkdir(parents=True)
    (folder / "config.properties").write_text(PROPERTIES.format(*ports))
    command: list[object] = [
        serve / "torchserve", "--start", "--foreground", "--ncs", "--disable-token-auth", "--enable-model-api",
        "--model-store", store, "--ts-config", folder / "config.properties",
    ]  # fmt: skip
    inference, management = (f"http://127.0.0.1:{port}" for port in ports[:2])
    # Its sockets and its pid file are in the folder for temporary files, under names that every TorchServe uses.
    env = environment(
        TMPDIR=folder / "tmp", TEMP=folder / "tmp", PATH=f"{serve}{os.pathsep}{os.environ['PATH']}"
    )
    with server(command, f"{inference}/ping", folder / "log", env=env, cwd=folder):
        yield inference, management


def test_torchserve(served: Served, serve: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    command = [
        serve / "torch-model-archiver", "--model-name", "digits", "--version", "1.0",
        "--serialized-file", served.folder / "model.pt", "--handler", EXAMPLE / "torchserve" / "handler.py",
        "--extra-files", f"{EXAMPLE / 'digits_model.py'},{served.folder / 'preprocessing.json'}",
        "--export-path", store,
    ]  # fmt: skip
    subprocess.run([str(each) for each in command], check=True, timeout=SECONDS, cwd=tmp_path)
    assert [each.name for each in store.iterdir()] == ["digits.mar"]

    with running(serve, store, tmp_path / "ts") as (inference, management):
        url = "url=digits.mar&initial_workers=1&synchronous=true&batch_size=8&max_batch_delay=200"
        loaded = request(f"{management}/models?{url}", method="POST")
        assert loaded.status == 200, (loaded, (tmp_path / "ts" / "log").read_text()[-3000:])
        check(f"{inference}/predictions/digits", served, 400)

        # Put together into one batch, the good ones are answered and the bad one is refused.
        good, bad = {"images": served.images[:2]}, BAD["too dark"]
        with ThreadPoolExecutor(8) as clients:
            sent = [good, bad, good, good, bad, good, good, good]
            asked = [clients.submit(request, f"{inference}/predictions/digits", body) for body in sent]
            for body, each in zip(sent, asked, strict=True):
                answer = each.result(SECONDS)
                assert answer.status == (400 if body is bad else 200), answer
                if body is good:
                    agrees(served, answer.body["predictions"])


# A data module without a trainer


def test_a_data_module_feeds_inference_without_a_trainer(served: Served, example: Any) -> None:
    data = example.DigitsData.for_serving(served.folder / "preprocessing.json")
    assert data.trainer is None
    model = torch.export.load(served.folder / "model.pt2").module()
    logits = torch.cat([model(batch) for batch in predict_batches(data)])
    torch.testing.assert_close(logits.softmax(1), served.probabilities, rtol=1e-4, atol=1e-5)


class Recorded(L.LightningDataModule):
    """Two loaders, and every hook."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def prepare_data(self) -> None:
        self.calls.append("prepare_data")

    def setup(self, stage: str) -> None:
        self.calls.append(f"setup {stage}")

    def teardown(self, stage: str) -> None:
        self.calls.append(f"teardown {stage}")

    def predict_dataloader(self) -> Any:
        return [DataLoader(torch.arange(4), 2), DataLoader(torch.arange(2), 2)]  # type: ignore[arg-type]

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch + 10 * (dataloader_idx + 1)

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch, batch.device.type


def test_the_hooks_are_called_in_the_trainers_order() -> None:
    data = Recorded()
    assert [(batch.tolist(), device) for batch, device in predict_batches(data)] == [
        ([10, 11], "cpu"), ([12, 13], "cpu"), ([20, 21], "cpu"),
    ]  # fmt: skip
    assert data.calls == ["prepare_data", "setup predict", "teardown predict"]
    with contextlib.closing(predict_batches(data)) as batches:
        next(batches)
    assert data.calls[-1] == "teardown predict" and len(data.calls) == 6
    batch, device = prepare_batch(data, torch.zeros(1), "meta", 1)
    assert device == batch.device.type == "meta"
