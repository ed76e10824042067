"""Precision plugins against what torch does by hand."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from trainyard.errors import MisconfigurationException
from trainyard.plugins import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from trainyard.plugins.precision import make_precision

CPU = torch.device("cpu")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 1))


def batch(number: int) -> torch.Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(number), dtype=torch.float32)


def connected(name: str, **scaler: Any) -> Precision:
    precision = make_precision(name)
    if name == "16-mixed":  # with the default scale of 65536 the first steps of these models overflow
        precision = MixedPrecision(
            name, "cpu", torch.amp.GradScaler("cpu", **{"init_scale": 1024.0, **scaler})
        )
    precision.connect(CPU)
    return precision


def step(
    precision: Precision, model: nn.Module, optimizer: torch.optim.Optimizer, number: int, *, hurt: bool = False,
    seen: Callable[[], None] = lambda: None,
) -> torch.Tensor:  # fmt: skip
    """One step as the loops make it."""

    def closure() -> torch.Tensor:
        with precision.forward_context(CPU):
            loss = model(precision.convert_input(batch(number))).float().square().mean()
        optimizer.zero_grad()
        precision.scale(loss).backward()  # type: ignore[no-untyped-call]
        if hurt:
            next(model.parameters()).grad.fill_(float("inf"))  # type: ignore[union-attr]
        precision.unscale(optimizer)
        seen()
        return loss

    answer = precision.optimizer_step(optimizer, closure)
    assert isinstance(answer, torch.Tensor)
    return answer


# ---- names


@pytest.mark.parametrize(
    ("given", "name", "kind"),
    [(None, "32-true", Precision), (32, "32-true", Precision), ("32", "32-true", Precision),
     ("32-true", "32-true", Precision), (64, "64-true", DoublePrecision), ("64", "64-true", DoublePrecision),
     ("64-true", "64-true", DoublePrecision), (16, "16-mixed", MixedPrecision), ("16", "16-mixed", MixedPrecision),
     ("16-mixed", "16-mixed", MixedPrecision), ("bf16", "bf16-mixed", MixedPrecision),
     ("bf16-mixed", "bf16-mixed", MixedPrecision), ("16-true", "16-true", HalfPrecision),
     ("bf16-true", "bf16-true", HalfPrecision)],
)  # fmt: skip
def test_names(given: Any, name: str, kind: type[Precision]) -> None:
    made = make_precision(given)
    assert type(made) is kind
    assert made.name == made.precision == name


@pytest.mark.parametrize(
    ("given", "said"),
    [("bf16_mixed", "did you mean 'bf16-mixed'"), (8, "precision: 8 is none of"), ("17", "none of '32-true'"),
     (True, "precision: True is none of"), ("transformer-engine", "is not supported; the nearest is 'bf16-mixed'")],
)  # fmt: skip
def test_unknown_names(given: Any, said: str) -> None:
    with pytest.raises(MisconfigurationException, match=r"^precision: ") as error:
        make_precision(given)
    assert said in str(error.value)


def test_classes_refuse_what_is_not_theirs() -> None:
    with pytest.raises(MisconfigurationException, match="neither '16-mixed' nor"):
        MixedPrecision("32")
    with pytest.raises(MisconfigurationException, match="neither '16-true' nor"):
        HalfPrecision("16-mixed")
    with pytest.raises(MisconfigurationException, match=r"^scaler: "):
        MixedPrecision("bf16-mixed", "cpu", torch.amp.GradScaler("cpu"))


def test_an_instance_is_taken_as_it_is() -> None:
    mine = MixedPrecision("16-mixed", "cpu")
    assert make_precision(mine) is mine
    assert isinstance(mine.scaler, torch.amp.GradScaler)


# ---- one dtype for all


@pytest.mark.parametrize(
    ("name", "dtype"), [("64-true", torch.float64), ("bf16-true", torch.bfloat16), ("16-true", torch.float16)]
)
def test_true_precision_is_in_weights_inputs_outputs_and_states(name: str, dtype: torch.dtype) -> None:
    precision = connected(name)
    with precision.init_context():
        model = precision.convert_module(net())
        assert nn.Linear(2, 2).weight.dtype == dtype
    assert torch.get_default_dtype() == torch.float32
    assert {p.dtype for p in model.parameters()} == {dtype}
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    with precision.forward_context(CPU):
        assert torch.zeros(1).dtype == dtype
        assert model(precision.convert_input(batch(1))).dtype == dtype
    step(precision, model, optimizer, 1)
    assert {s["exp_avg"].dtype for s in optimizer.state.values()} == {dtype}
    assert torch.get_default_dtype() == torch.float32


def test_double_is_torchs_double() -> None:
    precision, ours, theirs = connected("64-true"), net(), net().double()
    ours = precision.convert_module(ours)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (ours, theirs)]
    for number in range(3):
        step(precision, ours, optimizers[0], number)
        optimizers[1].zero_grad()
        # `step` has its loss in float32, like a module that says .float() itself.
        theirs(batch(number).double()).float().square().mean().backward()
        optimizers[1].step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_default_dtype_is_put_back_after_an_error() -> None:
    with pytest.raises(KeyError), connected("64-true").forward_context(CPU):
        raise KeyError("in a step")
    assert torch.get_default_dtype() == torch.float32


class Pair(NamedTuple):
    left: torch.Tensor
    right: str


@dataclass
class Record:
    values: torch.Tensor
    name: str


def test_inputs_of_any_shape_are_cast_where_they_are_floats() -> None:
    given = {
        "floats": torch.ones(2), "ints": torch.ones(2, dtype=torch.int64), "mask": torch.ones(2, dtype=torch.bool),
        "pair": Pair(torch.ones(1), "x"), "list": [torch.ones(1), 3], "record": Record(torch.ones(1), "y"),
        "complex": torch.ones(1, dtype=torch.complex64),
    }  # fmt: skip
    half = HalfPrecision("bf16-true").convert_input(given)
    assert half["floats"].dtype == half["pair"].left.dtype == half["list"][0].dtype == torch.bfloat16
    assert half["record"].values.dtype == torch.bfloat16
    assert half["ints"].dtype == torch.int64
    assert half["mask"].dtype == torch.bool
    assert (half["pair"].right, half["list"][1], half["record"].name) == ("x", 3, "y")
    assert half["complex"].dtype == torch.complex64
    assert DoublePrecision().convert_input(given)["complex"].dtype == torch.complex128
    assert given["floats"].dtype == torch.float32  # type: ignore[attr-defined]


# ---- mixed


def test_bf16_mixed_is_autocast_alone() -> None:
    precision, ours, theirs = connected("bf16-mixed"), net(), net()
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (ours, theirs)]
    for number in range(3):
        step(precision, ours, optimizers[0], number)
        optimizers[1].zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            theirs(batch(number)).float().square().mean().backward()
        optimizers[1].step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)
    assert precision.state_dict() == {}


def test_16_mixed_is_autocast_and_torchs_scaler() -> None:
    """With clipping, over a growth of the scale and a step that is left out."""
    settings = {"init_scale": 1024.0, "growth_interval": 2}
    precision, ours, theirs = connected("16-mixed", **settings), net(), net()
    optimizers = [torch.optim.Adam(m.parameters(), 0.1) for m in (ours, theirs)]
    scaler = torch.amp.GradScaler("cpu", **settings)  # type: ignore[arg-type]
    for number in range(6):
        hurt = number == 3
        step(precision, ours, optimizers[0], number, hurt=hurt,
             seen=lambda: torch.nn.utils.clip_grad_norm_(ours.parameters(), 0.1))  # fmt: skip
        optimizers[1].zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = theirs(batch(number)).float().square().mean()
        scaler.scale(loss).backward()
        if hurt:
            next(theirs.parameters()).grad.fill_(float("inf"))  # type: ignore[union-attr]
        scaler.unscale_(optimizers[1])
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
        scaler.step(optimizers[1])
        scaler.update()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
    assert precision.state_dict() == scaler.state_dict()
    assert scaler.get_scale() == 2048.0  # 1024, doubled after two, halved by the inf, doubled after two


def test_gradients_are_unscaled_before_the_hooks() -> None:
    precision, model = connected("16-mixed"), net()
    norms = []
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    step(precision, model, optimizer, 1, seen=lambda: norms.append(norm(model)))
    with torch.autocast("cpu", torch.float16):
        model.zero_grad()
        model(batch(1)).float().square().mean().backward()
    assert norms[0] == pytest.approx(norm(model), rel=1e-2)


def norm(model: nn.Module) -> float:
    return float(torch.nn.utils.get_total_norm(p.grad for p in model.parameters() if p.grad is not None))


def test_unscale_twice_is_once() -> None:
    """on_before_optimizer_step, clip_gradients and the step itself may all ask for it."""
    precision, model = connected("16-mixed"), net()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    norms = []

    def seen() -> None:
        norms.append(norm(model))
        precision.unscale(optimizer)
        norms.append(norm(model))

    step(precision, model, optimizer, 1, seen=seen)
    assert norms[0] == norms[1]


def test_a_step_with_inf_changes_nothing_and_halves_the_scale() -> None:
    precision, model = connected("16-mixed"), net()
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    before = [p.clone() for p in model.parameters()]
    scale = precision.state_dict()["scale"]
    with warnings.catch_warnings():
        warnings.simplefilter(
            "error"
        )  # torch's "lr_scheduler.step() before optimizer.step()" is not true here
        step(precision, model, optimizer, 1, hurt=True)
        scheduler.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not optimizer.state
    assert precision.state_dict()["scale"] == scale / 2
    assert scheduler.get_last_lr() == [pytest.approx(0.01)]
    step(precision, model, optimizer, 2)
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_two_optimizers_step_with_the_scale_their_gradients_were_made_with() -> None:
    """Lightning updates the scale after the first optimizer; the second one's gradients are then off by a factor of 2."""
    first, second = net(), net()
    one, two = torch.optim.SGD(first.parameters(), 0.1), torch.optim.SGD(second.parameters(), 0.1)
    precision = connected("16-mixed", growth_interval=1)
    with precision.forward_context(CPU):
        losses = [m(batch(1)).float().square().mean() for m in (first, second)]
    for loss in losses:
        precision.scale(loss).backward()  # type: ignore[no-untyped-call]
    for optimizer in (one, two):
        precision.optimizer_step(optimizer, lambda: None)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert precision.state_dict()["scale"] == 2048.0


def test_one_optimizer_may_step_twice() -> None:
    """Manual optimization: two backward passes, two steps, no end of a batch between them."""
    precision, model = connected("16-mixed"), net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for number in (1, 2):
        before = [p.clone() for p in model.parameters()]
        step(precision, model, optimizer, number)
        precision.optimizer_step(optimizer, lambda: None)
        assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_no_loss_is_no_step() -> None:
    precision, model = connected("16-mixed"), net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = [p.clone() for p in model.parameters()]
    assert precision.optimizer_step(optimizer, lambda: precision.unscale(optimizer)) is None
    step(precision, model, optimizer, 1)
    after = [p.clone() for p in model.parameters()]
    optimizer.zero_grad()
    precision.optimizer_step(optimizer, lambda: None)
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(after, model.parameters(), strict=True))


def test_a_loss_that_was_not_scaled_is_said() -> None:
    precision, model = connected("16-mixed"), net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(batch(1)).mean().backward()
    with pytest.raises(MisconfigurationException, match="manual_backward"):
        precision.optimizer_step(optimizer, lambda: None)


def test_lbfgs_and_a_scaler_do_not_go_together() -> None:
    optimizer = torch.optim.LBFGS(net().parameters())
    with pytest.raises(MisconfigurationException, match="LBFGS"):
        connected("16-mixed").optimizer_step(optimizer, lambda: None)


def test_scaler_goes_on_where_it_was() -> None:
    """A resumed run has the same scale and the same count towards its next growth."""
    ours, theirs = connected("16-mixed", growth_interval=3), connected("16-mixed", growth_interval=3)
    model, twin = net(), net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for number in range(2):
        step(ours, model, optimizer, number)
    state = torch_saved(ours.state_dict())
    assert state["_growth_tracker"] == 2
    theirs.load_state_dict(state)
    twin.load_state_dict(model.state_dict())
    twins = torch.optim.SGD(twin.parameters(), 0.1)
    for number in range(2, 5):
        step(ours, model, optimizer, number)
        step(theirs, twin, twins, number)
    assert ours.state_dict() == theirs.state_dict() != state
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def torch_saved(state: dict[str, Any]) -> Any:
    """Through what a checkpoint goes through: tensors and primitives only."""
    import io

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_checkpoint_of_another_precision_has_no_scaler() -> None:
    precision = connected("16-mixed")
    before = precision.state_dict()
    precision.load_state_dict({})
    assert precision.state_dict() == before
    bf16 = connected("bf16-mixed")
    bf16.load_state_dict(before)
    assert bf16.state_dict() == {}
