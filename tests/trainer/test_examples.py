"""The examples as a user runs them; and each, stopped halfway and started again, ends as if nothing had happened.

`digits` is in test_resume_exact.py, `serving` in test_serving.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.trainer.forkhost import ROOT, Host


def run(host: Host, tmp_path: Path, example: str, *args: str, world: int = 1) -> str:
    """What rank 0 printed."""
    env = {"PL_TRAINER_DEFAULT_ROOT_DIR": str(tmp_path / "logs"), "PL_TRAINER_ACCELERATOR": "cpu"}
    script = str(ROOT / "examples" / example / "train.py")
    ranks = host.run([script, *args], world=world, env=env, seconds=200)
    assert [rank.code for rank in ranks] == [0] * world, "\n".join(rank.output[-3000:] for rank in ranks)
    return ranks[0].output


def end(output: str) -> list[str]:
    """The last validation, and what the script itself says at its end: no throughput, no paths."""
    lines = [line for line in output.splitlines() if " validation " in line][-1:]
    return lines + [
        line for line in output.splitlines() if re.match(r"accuracy|numbers|[ .:=+*#%@-]{100}", line)
    ]


CASES = {
    "gan": (["--batch-size", "128", "--picture"], 2, 1),
    "finetune": (["--thaw", "1"], 3, 1),
    "fsdp": (["--samples", "256", "--batch-size", "32"], 2, 2),
}


@pytest.mark.parametrize("example", CASES)
def test_an_example_goes_on_where_it_was(host: Host, tmp_path: Path, example: str) -> None:
    args, epochs, world = CASES[example]
    if example == "finetune":
        args = [*args, "--backbone", str(tmp_path / "backbone.ckpt")]
    unbroken = run(host, tmp_path, example, *args, "--epochs", str(epochs), world=world)
    checkpoint = ["--checkpoint", f"file://{tmp_path}/checkpoints"]
    run(host, tmp_path, example, *args, *checkpoint, "--epochs", str(epochs - 1), world=world)
    resumed = run(host, tmp_path, example, *args, *checkpoint, "--epochs", str(epochs), world=world)
    assert "resumed at step" in resumed
    assert end(unbroken)
    assert end(resumed) == end(unbroken)


def test_the_character_model_learns_and_writes(host: Host, tmp_path: Path) -> None:
    output = run(
        host, tmp_path, "textgen", "--epochs", "2", "--hidden", "16", "--batch-size", "64", "--window", "32"
    )
    losses = [float(loss) for loss in re.findall(r"val_loss=([\d.]+)", output)]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    assert "final weights sha256=" in output
