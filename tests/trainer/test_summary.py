"""Model summaries: the numbers against sums done by hand, and that taking them changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import trainyard as L
from tests.trainer.models import Regression, loader, trainer
from trainyard.callbacks.model_summary import ModelSummary as Callback
from trainyard.callbacks.rich_model_summary import RichModelSummary
from trainyard.utilities.model_summary import ModelSummary, get_human_readable_count, summarize


class Net(L.LightningModule):
    def __init__(self, example: Any = None) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Linear(4, 8),
            torch.nn.BatchNorm1d(8),
            torch.nn.Dropout(0.5),
            torch.nn.Linear(8, 2, bias=False),
        )
        self.scale = torch.nn.Parameter(torch.ones(3))
        self.frozen = torch.nn.Linear(2, 2).requires_grad_(False).eval()
        if example is not None:
            self.example_input_array = example

    def forward(self, inputs: torch.Tensor) -> Any:
        out = self.body(inputs)
        return out, self.frozen(out)


TABLE = """\
  | Name         | Type       | Params | Mode  | FLOPs | In sizes | Out sizes
-----------------------------------------------------------------------------
0 | body         | Sequential | 72     | train | 480   | [5, 4]   | [5, 2]
1 | frozen       | Linear     | 6      | eval  | 40    | [5, 2]   | [5, 2]
  | other params | n/a        | 3      | n/a   | n/a   | n/a      | n/a
-----------------------------------------------------------------------------
75        Trainable params
6         Non-trainable params
81        Total params
0.000     Total estimated model params size (MB)
5         Modules in train mode
1         Modules in eval mode
520       Total FLOPs"""


def test_the_table() -> None:
    """Linear(4, 8) on 5 rows multiplies and adds 5 * 4 * 8 times."""
    assert str(ModelSummary(Net(torch.zeros(5, 4)))) == TABLE


def test_depth() -> None:
    net = Net(torch.zeros(5, 4))
    deep = summarize(net, max_depth=-1)
    assert deep.layer_names == ["body", "body.0", "body.1", "body.2", "body.3", "frozen"]
    assert deep.param_nums == [72, 40, 16, 0, 16, 6]
    assert deep.flop_counts == {
        "body": 480, "body.0": 320, "body.1": 0, "body.2": 0, "body.3": 160, "frozen": 40
    }  # fmt: skip
    assert deep.out_sizes == [[5, 2], [5, 8], [5, 8], [5, 8], [5, 2], [5, 2]]
    assert deep.leftover_parameters == 3
    none = ModelSummary(net, max_depth=0)
    assert (none.layer_names, none.leftover_parameters, none.total_parameters) == ([], 81, 81)
    assert "other params" in str(none)
    with pytest.raises(ValueError, match="max_depth"):
        ModelSummary(net, max_depth=-2)


def test_taking_it_changes_nothing() -> None:
    net = Net(torch.randn(5, 4))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    ModelSummary(net)
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not net.body._forward_hooks and all(p.grad is None for p in net.parameters())


def test_shared_weights_count_once_and_size_is_in_their_type() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode = torch.nn.Linear(1000, 1000, bias=False)
            self.decode = torch.nn.Linear(1000, 1000, bias=False)
            self.decode.weight = self.encode.weight

    summary = ModelSummary(Tied())
    assert (summary.total_parameters, summary.leftover_parameters) == (1_000_000, 0)
    assert summary.model_size == 4.0
    assert ModelSummary(Tied().bfloat16()).model_size == 2.0
    assert summary.columns()[5] == ("FLOPs", ["?", "?"])


@pytest.mark.parametrize("example", [(torch.zeros(2, 4),), {"inputs": torch.zeros(2, 4)}])
def test_forms_of_the_example(example: Any) -> None:
    assert ModelSummary(Net(example)).total_flops == 208


def test_an_example_that_does_not_fit_costs_only_the_sizes(caplog: pytest.LogCaptureFixture) -> None:
    summary = ModelSummary(Net(torch.zeros(5, 3)))
    assert not summary.measured and summary.total_parameters == 81
    assert "forward(example_input_array) raised RuntimeError" in caplog.text
    assert all(module.training for module in Net().body)


def test_lazy_layers_count_as_nothing_until_they_have_a_shape(capsys: pytest.CaptureFixture[str]) -> None:
    class Lazy(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.late = torch.nn.LazyLinear(3)

    summary = ModelSummary(Lazy())
    assert (summary.has_lazy_parameters, summary.total_parameters) == (True, 5)


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1.0 K"), (99_960, "100.0 K"), (999_999, "1.0 M"), (123_456_789, "123 M"),
     (2 * 10**13, "20.0 T"), (10**16, "10,000 T")],
)  # fmt: skip
def test_counts_for_people(number: int, text: str) -> None:
    assert get_human_readable_count(number) == text


class Fitted(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.zeros(3, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.net(inputs)  # type: ignore[no-any-return]


def test_a_fit_shows_it_once(capsys: pytest.CaptureFixture[str]) -> None:
    trainer(callbacks=[Callback()], max_epochs=2).fit(Fitted(), loader())
    shown = capsys.readouterr().out
    assert shown.count("Trainable params") == 1
    assert "0 | net  | Linear | 5      | train | 24    | [3, 4]   | [3, 1]" in shown
    trainer(callbacks=[Callback(max_depth=0)]).fit(Fitted(), loader())
    assert capsys.readouterr().out == ""


def test_rich_draws_the_same(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    trainer(callbacks=[RichModelSummary(header_style="bold")]).fit(Fitted(), loader())
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if "Linear" in line)
    assert [cell.strip() for cell in row.strip("│ ").split("│")] == [
        "0", "net", "Linear", "5", "train", "24", "[3, 4]", "[3, 1]"
    ]  # fmt: skip
    assert any(line.split() == ["24", "Total", "FLOPs"] for line in lines)


def test_the_mixed_precision_of_the_trainer_is_used() -> None:
    """The example goes the way of a batch: what forward sees has the precision of the training."""
    seen: list[torch.dtype] = []

    class Mixed(Fitted):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            out = self.net(inputs)
            seen.append(out.dtype)
            return out  # type: ignore[no-any-return]

    trainer(callbacks=[Callback()], precision="bf16-mixed", max_steps=1).fit(Mixed(), loader())
    assert seen[0] is torch.bfloat16
