"""safetensors: what is written is what is read, tied weights stay tied, and files are whole or not there."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_model
from torch import nn

import trainyard as L
from trainyard.export import ExportError
from trainyard.export.files import staged


class Tied(L.LightningModule):
    """A language model's usual shape: the embedding is the output layer's weight; and views of one buffer."""

    def __init__(self, size: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, 4)
        self.output = nn.Linear(4, size, bias=False)
        self.output.weight = self.embedding.weight
        self.small = nn.Parameter(torch.randn(3).bfloat16())
        table = torch.arange(8.0)
        self.register_buffer("whole", table)
        self.register_buffer("part", table[2:6])
        self.register_buffer("turned", torch.randn(3, 2).t())
        self.register_buffer("nothing", torch.empty(0))
        self.register_buffer("nothing_else", torch.empty(0))
        self.register_buffer("not_kept", torch.ones(2), persistent=False)


def header(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size])


def same(found: nn.Module, expected: nn.Module) -> None:
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
        assert found.state_dict()[name].dtype == value.dtype


def test_what_is_written_is_read_and_written_once(tmp_path: Path) -> None:
    module, path = Tied(), tmp_path / "a.safetensors"
    module.to_safetensors(path, metadata={"note": "hello"})
    written = header(path)
    about = written.pop("__metadata__")
    assert ("embedding.weight" in written) != ("output.weight" in written)
    assert about["class"].endswith("Tied") and about["note"] == "hello" and about["format"] == "pt"
    assert about["torch"] == str(torch.__version__) and about["trainyard"]

    other = Tied()
    assert other.load_safetensors(path) == ([], [])
    same(other, module)
    assert other.output.weight is other.embedding.weight
    assert not torch.equal(Tied().small, module.small)


def test_a_module_whose_weights_are_not_tied_gets_both(tmp_path: Path) -> None:
    module, path = Tied(), tmp_path / "a.safetensors"
    module.to_safetensors(path)
    other = Tied()
    other.output.weight = nn.Parameter(torch.randn(6, 4))
    other.load_safetensors(path)
    same(other, module)


def test_files_of_other_programs_load_and_ours_load_there(tmp_path: Path) -> None:
    module = Tied()
    del module.part  # which the vendor's function refuses to write
    save_model(module, tmp_path / "theirs.safetensors")
    other = Tied()
    del other.part
    other.load_safetensors(tmp_path / "theirs.safetensors")
    same(other, module)

    module.to_safetensors(tmp_path / "ours.safetensors")
    assert torch.equal(load_file(tmp_path / "ours.safetensors")["whole"], module.whole)


def test_what_does_not_fit_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    Tied(6).to_safetensors(path)
    with pytest.raises(ExportError, match=r"(?s)written from .*Tied\) does not fit.*size mismatch"):
        Tied(7).load_safetensors(path)
    module = nn.Linear(4, 6, bias=False)
    from trainyard.export import load_safetensors

    with pytest.raises(ExportError, match=r"(?s)Missing key.*Unexpected key"):
        load_safetensors(module, path)
    missing, unexpected = load_safetensors(module, path, strict=False)
    assert missing == ["weight"] and "small" in unexpected
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ExportError, match="no whole safetensors file"):
        Tied().load_safetensors(path)
    with pytest.raises(FileNotFoundError):
        Tied().load_safetensors(tmp_path / "none")


def test_what_is_no_dense_tensor_is_refused(tmp_path: Path) -> None:
    class Extra(Tied):
        def get_extra_state(self) -> Any:
            return {"a": 1}

        def set_extra_state(self, state: Any) -> None: ...

    class Sparse(Tied):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("graph", torch.eye(3).to_sparse())

    with pytest.raises(ExportError, match=r"_extra_state is no dense tensor \(dict\).*state_dict"):
        Extra().to_safetensors(tmp_path / "a")
    with pytest.raises(ExportError, match=r"graph is no dense tensor \(torch.sparse_coo\)"):
        Sparse().to_safetensors(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


SHARDS = """
import sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from tests.trainer.test_export_weights import Tied
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[1] + "/store", 1), rank=0, world_size=1)
module = Tied()
fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
for write in (module.to_safetensors, module.to_torchscript, module.to_exported_program):
    try:
        write(sys.argv[1] + "/weights")
    except ValueError as error:
        print(error)
dist.destroy_process_group()
"""


def test_a_module_that_is_split_over_processes_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SHARDS, tmp_path], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.count("are split over processes: export after fit has returned") == 3, done
    assert not (tmp_path / "weights").exists()


# Files


def test_a_failure_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_text("old")

    class Full(Exception):
        pass

    with pytest.raises(Full), staged(path) as file:
        file.write_text("half of the new")
        raise Full
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


KILLED = """
import os, signal, sys
from pathlib import Path
from trainyard.export.files import staged
path, moves = Path(sys.argv[1]), int(sys.argv[2])
replace = Path.replace
def counted(self, target):
    global moves
    if not moves:
        os.kill(os.getpid(), signal.SIGKILL)
    moves -= 1
    return replace(self, target)
Path.replace = counted
with staged(path) as file:
    file.write_text("new")
    file.with_name("model.data").write_text("new")
"""


@pytest.mark.parametrize("moves", [0, 1, 2])
def test_killed_at_any_moment_no_model_is_with_the_others_weights(tmp_path: Path, moves: int) -> None:
    model, data = tmp_path / "model", tmp_path / "model.data"
    model.write_text("old")
    data.write_text("old")
    command = [sys.executable, "-c", KILLED, model, str(moves)]
    killed = subprocess.run(command, timeout=60, check=False)
    assert killed.returncode == (0 if moves == 2 else -9)
    assert not model.exists() or model.read_text() == data.read_text()
    assert model.exists() == (moves == 2)
