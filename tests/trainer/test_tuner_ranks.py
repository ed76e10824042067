"""Searches and progress of two ranks: they decide alike, exchange what they must, and one of them speaks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.trainer.forkhost import Host

SCRIPT = """
import json, sys, torch
from torch.utils.data import DataLoader
import trainyard as L
from tests.trainer.models import Regression, numbers
from trainyard.callbacks import progress
from trainyard.tuner import Tuner

class Net(Regression):
    def __init__(self, lr=0.01, batch_size=4, room=100):
        super().__init__(lr)
        self.batch_size, self.room = batch_size, room
        self.norm = torch.nn.BatchNorm1d(4)  # DDP broadcasts its buffers: a collective in forward

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        if self.trainer.global_rank == 1 and len(inputs) > self.room:
            torch.empty(1 << 50, dtype=torch.uint8)  # rank 1 alone runs out of memory
        return torch.nn.functional.mse_loss(self.net(self.norm(inputs)), targets)

    def train_dataloader(self):
        return DataLoader(numbers(64), self.batch_size, shuffle=True)

def trainer(**kwargs):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "accelerator": "cpu"}
    return L.Trainer(**quiet | {"enable_progress_bar": False, "max_epochs": 1} | kwargs)

def fitted(net, tune):
    L.seed_everything(1, verbose=False)
    run = trainer()
    found = tune(Tuner(run), net)
    run.fit(net)
    return found, {name: value.tolist() for name, value in net.state_dict().items()}

plain = fitted(Net(), lambda tuner, net: None)[1]
swept, after = fitted(Net(), lambda tuner, net: tuner.lr_find(net, num_training=20, update_attr=False))
assert after == plain
assert swept.lr_at(19) == 1.0
bounded, with_size = fitted(Net(room=10), lambda tuner, net: tuner.scale_batch_size(net))
assert with_size == fitted(Net(batch_size=8), lambda tuner, net: None)[1]

speaks = trainer(enable_progress_bar=True, log_every_n_steps=2)
speaks.fit(Net())
bar = trainer(enable_progress_bar=True, callbacks=[progress.TQDMProgressBar()])
bar.fit(Net())
result = {"loss": swept.results["loss"], "suggestion": swept.suggestion(), "size": bounded}
result["weights"] = [p.tolist() for p in bar.lightning_module.parameters()]  # running statistics are each rank's own
print("RESULT" + json.dumps(result), flush=True)
"""


@pytest.fixture(scope="module")
def outputs(host: Host, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    script: Path = tmp_path_factory.mktemp("tuner") / "script.py"
    script.write_text(SCRIPT)
    ranks = host.run([str(script)], world=2)
    assert [rank.code for rank in ranks] == [0, 0], "\n".join(rank.output for rank in ranks)
    return [rank.output for rank in ranks]


def test_both_find_the_same_and_leave_nothing(outputs: list[str]) -> None:
    """That a fit after a sweep is as without, and one with the size that was found as if told, is in the script."""
    left, right = (json.loads(output.partition("RESULT")[2].splitlines()[0]) for output in outputs)
    assert left == right
    assert len(left["loss"]) == 20 and left["size"] == 8


def test_one_of_them_speaks(outputs: list[str]) -> None:
    assert "epoch 0 step 8/8 loss=" in outputs[0] and "Epoch 0/0" in outputs[0]
    assert "epoch 0 step" not in outputs[1] and "Epoch 0/0" not in outputs[1]
    assert outputs[0].count("Batch size set to 8") == 1 and "Batch size" not in outputs[1]
