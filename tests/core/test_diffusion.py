from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from pydantic import ValidationError
from torch import Tensor

from text2weight.condition import Condition, condition_on_classes
from text2weight.diffusion import NoiseSchedule, Prediction

N = 1000
ORACLE_NAME = {"x0": "sample", "epsilon": "epsilon", "v": "v_prediction"}


@pytest.fixture(params=["linear", "cosine"])
def schedule(request: pytest.FixtureRequest) -> NoiseSchedule:
    return NoiseSchedule(kind=request.param)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(0)
    timesteps = torch.tensor([1, 10, 300, 700, 950])
    return torch.randn(5, 7, generator=source), timesteps, torch.randn(5, 7, generator=source)


@pytest.mark.parametrize("count", [10, 40, 1000])
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_signal_falls_from_all_to_almost_none(kind: str, count: int) -> None:
    alphas_bar = NoiseSchedule(kind=kind, num_timesteps=count).alphas_bar
    assert alphas_bar.shape == (count + 1,)
    assert alphas_bar.dtype == torch.float64
    assert alphas_bar[0] == 1
    assert bool((alphas_bar.diff() < 0).all())
    assert 0 < float(alphas_bar[-1]) < 1e-3


@pytest.mark.parametrize(("kind", "name"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_schedule_equals_diffusers(kind: str, name: str) -> None:
    oracle = DDPMScheduler(num_train_timesteps=N, beta_start=1e-4, beta_end=0.02, beta_schedule=name)
    alphas_bar = NoiseSchedule(kind=kind, num_timesteps=N).alphas_bar[1:].float()
    torch.testing.assert_close(alphas_bar, oracle.alphas_cumprod, atol=1e-6, rtol=1e-4)


def test_forward_noising_equals_diffusers(schedule: NoiseSchedule, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    clean, timesteps, noise = batch
    oracle = DDPMScheduler(num_train_timesteps=N)
    oracle.alphas_cumprod = schedule.alphas_bar[1:]
    expected = oracle.add_noise(clean, noise, timesteps - 1)
    torch.testing.assert_close(schedule.add_noise(clean, timesteps, noise), expected)


def test_timestep_zero_adds_no_noise(schedule: NoiseSchedule) -> None:
    clean = torch.randn(3, 4)
    assert torch.equal(schedule.add_noise(clean, torch.zeros(3, dtype=torch.long), torch.randn(3, 4)), clean)


def test_v_target_equals_diffusers(schedule: NoiseSchedule, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    clean, timesteps, noise = batch
    oracle = DDPMScheduler(num_train_timesteps=N)
    oracle.alphas_cumprod = schedule.alphas_bar[1:]
    expected = oracle.get_velocity(clean, noise, timesteps - 1)
    torch.testing.assert_close(schedule.target("v", clean, timesteps, noise), expected)


@pytest.mark.parametrize("prediction", ["x0", "epsilon", "v"])
def test_estimates_of_the_clean_sample_equal_diffusers(
    schedule: NoiseSchedule, batch: tuple[Tensor, Tensor, Tensor], prediction: Prediction
) -> None:
    noisy, timesteps, output = batch
    oracle = DDIMScheduler(num_train_timesteps=N, clip_sample=False, prediction_type=ORACLE_NAME[prediction])
    oracle.alphas_cumprod = schedule.alphas_bar[1:]
    oracle.set_timesteps(N)
    actual = schedule.to_clean(prediction, output, noisy, timesteps)
    for i, timestep in enumerate(timesteps):
        expected = oracle.step(output[i], int(timestep) - 1, noisy[i]).pred_original_sample
        torch.testing.assert_close(actual[i], expected.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prediction", ["x0", "epsilon", "v"])
def test_a_perfect_network_gives_the_clean_sample(
    schedule: NoiseSchedule, batch: tuple[Tensor, Tensor, Tensor], prediction: Prediction
) -> None:
    clean, timesteps, noise = batch
    output = schedule.target(prediction, clean, timesteps, noise)
    noisy = schedule.add_noise(clean, timesteps, noise)
    recovered = schedule.to_clean(prediction, output, noisy, timesteps)
    torch.testing.assert_close(recovered, clean, atol=1e-4, rtol=1e-4)


def test_a_copy_with_other_fields_has_its_own_values() -> None:
    schedule = NoiseSchedule(num_timesteps=50)
    assert schedule.alphas_bar.shape == (51,)
    assert schedule.model_copy(update={"num_timesteps": 10}).alphas_bar.shape == (11,)


def test_a_schedule_first_used_for_inference_still_trains() -> None:
    schedule = NoiseSchedule(num_timesteps=123)
    with torch.inference_mode():
        schedule.signal_and_noise(torch.tensor([5]))
    clean = torch.randn(1, 4, requires_grad=True)
    schedule.add_noise(clean, torch.tensor([5]), torch.randn(1, 4)).square().sum().backward()
    assert clean.grad is not None


def test_a_schedule_cannot_be_changed_or_misspelt() -> None:
    with pytest.raises(ValidationError):
        NoiseSchedule().num_timesteps = 5  # type: ignore[misc]
    with pytest.raises(ValidationError):
        NoiseSchedule(steps=5)  # type: ignore[call-arg]
    with pytest.raises(ValidationError):
        NoiseSchedule(num_timesteps=0)


@pytest.mark.parametrize("prediction", ["x0", "epsilon", "v"])
def test_a_denoiser_is_shown_what_it_can_use(prediction: Prediction) -> None:
    """Predicting x_0 it sees sqrt(abar_n) x_n, which vanishes near n = N; predicting noise it sees x_n itself."""
    schedule = NoiseSchedule()
    noisy, timesteps = torch.randn(3, 5), torch.tensor([1, 500, 1000])
    condition = condition_on_classes(torch.randn(3, 2, 4), torch.ones(3, 2, dtype=torch.bool))
    seen: list[Tensor] = []

    def denoiser(shown: Tensor, at: Tensor, under: Condition) -> Tensor:
        assert at is timesteps
        assert under is condition
        seen.append(shown)
        return shown + 1

    output, clean = schedule.run_denoiser(denoiser, prediction, noisy, timesteps, condition)
    factor = schedule.alphas_bar[timesteps].sqrt().float()[:, None] if prediction == "x0" else torch.ones(3, 1)
    torch.testing.assert_close(seen[0], factor * noisy)
    torch.testing.assert_close(clean, schedule.to_clean(prediction, output, noisy, timesteps))
