"""Manual optimization against loops written by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import trainyard as L
from tests.trainer.forkhost import Host
from tests.trainer.models import Regression, loader, trainer
from trainyard.errors import MisconfigurationException


class Gan(L.LightningModule):
    """Two optimizers that take turns within a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(5)
        self.generator = torch.nn.Linear(4, 4)
        self.critic = torch.nn.Linear(4, 1)

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.Adam(self.generator.parameters(), 0.01),
            torch.optim.SGD(self.critic.parameters(), 0.1),
        ]

    def losses(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        fake = self.critic(self.generator(batch[0])).mean()
        return -fake, self.critic(self.generator(batch[0]).detach()).mean() - self.critic(batch[0]).mean()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        for number, optimizer in enumerate((first, second)):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            loss = self.losses(batch)[number]
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)
            self.log(f"loss{number}", loss)


def by_hand(batches: list[Any]) -> dict[str, torch.Tensor]:
    model = Gan()
    optimizers = model.configure_optimizers()
    for batch in batches:
        for number, optimizer in enumerate(optimizers):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            optimizer.zero_grad()
            gradients = torch.autograd.grad(model.losses(batch)[number], parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
    return model.state_dict()


def test_two_optimizers_do_what_a_loop_by_hand_does() -> None:
    model, fit = Gan(), trainer(max_epochs=2, log_every_n_steps=1)
    fit.fit(model, loader(12, 4))
    wanted = by_hand(list(loader(12, 4)) * 2)
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())
    assert fit.global_step == 12  # Lightning's count: each optimizer's steps
    assert fit.loop_state.stepped == 6
    assert (fit.total_steps, fit.estimated_stepping_batches) == (12, 6)
    assert set(fit.callback_metrics) == {"loss0", "loss1"}
    assert all(p.requires_grad for p in model.parameters())


def test_hooks_and_closures() -> None:
    seen: list[str] = []

    class Closures(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            optimizer = self.optimizers()

            def closure() -> torch.Tensor:
                optimizer.zero_grad()
                loss = self.loss(batch)
                self.manual_backward(loss)
                return loss

            with optimizer.toggle_model():
                return optimizer.step(closure)  # type: ignore[no-any-return]

        def on_before_backward(self, loss: torch.Tensor) -> None:
            seen.append("before backward")

        def on_after_backward(self) -> None:
            seen.append("after backward")

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            seen.append("before step")

    model, automatic = Closures(), Regression()
    fit = trainer()
    fit.fit(model, loader(8, 4))
    trainer().fit(automatic, loader(8, 4))
    assert torch.equal(model.net.weight, automatic.net.weight)
    assert seen == ["before backward", "after backward", "before step"] * 2
    assert isinstance(fit.optimizers[0], torch.optim.SGD)
    assert fit.last_loss is not None


def test_schedulers_are_the_modules_business() -> None:
    class Scheduled(Gan):
        def configure_optimizers(self) -> Any:
            optimizers = super().configure_optimizers()
            return optimizers, [torch.optim.lr_scheduler.StepLR(o, 1) for o in optimizers]

        def on_train_epoch_end(self) -> None:
            self.lr_schedulers()[1].step()

    fit = trainer(max_epochs=2)
    fit.fit(Scheduled(), loader(8, 4))
    assert fit.optimizers[0].param_groups[0]["lr"] == 0.01
    assert fit.optimizers[1].param_groups[0]["lr"] == pytest.approx(0.1 * 0.1**2)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"gradient_clip_val": 1.0}, "gradient_clip_val"),
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches"),
    ],
)
def test_what_the_trainer_cannot_do_for_it_is_refused(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(MisconfigurationException, match=named):
        trainer(**arguments).fit(Gan(), loader())


def test_manual_backward_needs_manual_optimization() -> None:
    class Confused(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.manual_backward(self.loss(batch))

    with pytest.raises(MisconfigurationException, match="automatic_optimization = False"):
        trainer().fit(Confused(), loader())


def test_clipping_by_the_module() -> None:
    norms: list[float] = []

    class Clipped(Gan):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()[0]
            optimizer.zero_grad()
            self.manual_backward(self.losses(batch)[0] * 100)
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            norms.append(
                float(
                    torch.nn.utils.get_total_norm(
                        [p.grad for p in self.generator.parameters() if p.grad is not None]
                    )
                )
            )
            optimizer.step()

    trainer().fit(Clipped(), loader())
    assert norms
    assert max(norms) <= 0.5001


SCRIPT = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from tests.trainer.test_library_manual import Gan
from tests.trainer.models import loader, trainer
model = Gan()
fit = trainer(strategy="ddp_find_unused_parameters_true", max_epochs=2)
fit.fit(model, loader(16, 4))
torch.save(model.state_dict(), sys.argv[2] + f"/{fit.global_rank}.pt")
"""


def test_ranks_average_the_gradients_of_a_manual_backward(host: Host, tmp_path: Any) -> None:
    from tests.trainer.forkhost import ROOT

    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    host.run([str(script), str(ROOT), str(tmp_path)], world=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    wanted = by_hand(list(loader(16, 8)) * 2)
    for name, value in wanted.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value)
