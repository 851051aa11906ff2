"""The watch over a fit's losses: what it lets pass and what it does not."""

from __future__ import annotations

import math

import pytest
import torch

from text2weight_training.loss_watch import EXPLODED, READ_TOGETHER, WINDOW, DivergedError, LossWatch, StepWatch


def test_the_limit_is_a_multiple_of_the_median() -> None:
    watch = LossWatch([0.0, 100.0] + [2.0, 3.0] * (WINDOW // 2 - 1))  # median 2.5
    assert watch.complaint(2.5 * EXPLODED) is None
    assert watch.complaint(2.5 * EXPLODED + 0.1) == "the loss exploded from a median of 2.5 to 25.1"


def test_the_first_steps_may_stray_further() -> None:
    watch = LossWatch([2.5] * (WINDOW - 1))
    assert watch.complaint(2.5 * EXPLODED**2) is None
    assert watch.complaint(2.5 * EXPLODED**2 + 1) == "the loss exploded from a median of 2.5 to 251"
    watch.add(2.5)
    assert watch.complaint(2.5 * EXPLODED**2) is not None


def test_only_the_last_losses_count() -> None:
    watch = LossWatch([1000.0])
    assert watch.complaint(20.0) is None
    for _ in range(WINDOW):
        watch.add(1.0)
    assert watch.losses == [1.0] * WINDOW
    assert watch.complaint(20.0) is not None


def test_the_first_loss_needs_only_be_finite() -> None:
    assert LossWatch().complaint(1e30) is None
    for broken in (math.nan, math.inf):
        assert LossWatch().complaint(broken) == "the loss is not finite"
        assert LossWatch([1.0]).complaint(broken) == "the loss is not finite"


@pytest.mark.parametrize("turns", [[1.0, 2.0] * 100, [5.0 * 0.95**i for i in range(200)], [0.7] * 99 + [3.2]])
def test_what_doubles_falls_or_stands_out_once_is_sound(turns: list[float]) -> None:
    watch = LossWatch()
    for loss in turns:
        assert watch.complaint(loss) is None
        watch.add(loss)


def test_a_watch_goes_on_from_its_losses() -> None:
    watch = LossWatch([1.0, 2.0])
    assert LossWatch(watch.losses).complaint(500.0) == watch.complaint(500.0)
    assert watch.complaint(500.0) is not None


def test_losses_near_nothing_are_measured_against_the_least() -> None:
    watch = LossWatch([1e-6] * WINDOW, least=0.5)
    assert watch.complaint(0.5 * EXPLODED) is None
    assert watch.complaint(0.5 * EXPLODED + 0.1) == "the loss exploded from a median of 1e-06 to 5.1"


def step_watch(losses: list[float]) -> StepWatch:
    watch = StepWatch("the head", "lower it", guess=0.1)
    for loss in losses:
        watch.add(torch.tensor(loss))
    return watch


@pytest.mark.parametrize(
    ("loss", "complaint"),
    [(math.nan, "the loss is not finite"), (500.0, "the loss exploded from a median of 1 to 500")],
)
@pytest.mark.parametrize("step", [1, 2, READ_TOGETHER, READ_TOGETHER + 1])
def test_a_step_watch_names_the_step_within_the_next_few(step: int, loss: float, complaint: str) -> None:
    before, after = [1.0] * (step - 1), -step % READ_TOGETHER
    if step == 1 and math.isfinite(loss):  # there is nothing yet that it could have exploded from
        step_watch([loss]).check()
        return
    message = rf"^the head diverged at step {step} \({complaint}\): lower it$"
    with pytest.raises(DivergedError, match=message):
        step_watch([*before, loss] + [1.0] * after)
    with pytest.raises(DivergedError, match=message):  # where the run ends sooner
        step_watch([*before, loss]).check()


def test_a_step_watch_judges_the_last_weights_and_reads_a_loss_once() -> None:
    watch = step_watch([1.0, 1.0, 1.0])
    watch.check_weights(torch.ones(3))
    watch.add(torch.tensor(1.0))
    with pytest.raises(DivergedError, match=r"^the head diverged at step 4 \(the weights are not finite\): lower it$"):
        watch.check_weights(torch.tensor([1.0, math.inf]))
