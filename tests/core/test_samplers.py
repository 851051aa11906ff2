from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from text2weight.diffusion import NoiseSchedule
from text2weight.errors import InvalidInputError
from text2weight.samplers import SAMPLERS, check_sampler, make_plan, take_steps

N = 100
MULTISTEP = ("ddpm", "ddim", "dpmpp_2m")
Model = Callable[[Tensor, int], Tensor]


def nonlinear_model(noisy: Tensor, timestep: int) -> Tensor:
    return torch.tanh(0.7 * noisy + 0.01 * timestep - 0.3)


def run(sampler: str, steps: int, schedule: NoiseSchedule, noisy: Tensor, model: Model, seed: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    previous = torch.zeros_like(noisy)
    for step in make_plan(sampler, steps, schedule):
        clean = model(noisy, step.timestep)
        noise = torch.randn(noisy.shape, generator=source) if step.noise else torch.zeros_like(noisy)
        noisy = take_steps([step] * len(noisy), noisy, clean, previous, noise)
        previous = clean
    return noisy


def oracle_arguments(schedule: NoiseSchedule) -> dict[str, object]:
    scale = 1000 / schedule.num_timesteps
    return {
        "num_train_timesteps": schedule.num_timesteps,
        "beta_start": 1e-4 * scale,
        "beta_end": 0.02 * scale,
        "beta_schedule": "linear" if schedule.kind == "linear" else "squaredcos_cap_v2",
        "prediction_type": "sample",
    }


def oracle_run(scheduler: object, noisy: Tensor, model: Model, **step_arguments: object) -> Tensor:
    """Drive a diffusers scheduler; its index t is our timestep n minus one, since n = 0 is the clean sample."""
    for t in scheduler.timesteps:  # type: ignore[attr-defined]
        estimate = model(noisy, int(t) + 1)
        noisy = scheduler.step(estimate, t, noisy, **step_arguments).prev_sample  # type: ignore[attr-defined]
    return noisy


@pytest.fixture(params=["linear", "cosine"])
def schedule(request: pytest.FixtureRequest) -> NoiseSchedule:
    return NoiseSchedule(kind=request.param, num_timesteps=N)


@pytest.fixture
def start() -> Tensor:
    return torch.randn(2, 50, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("steps", [1, 4, 20, N])
def test_ddim_follows_diffusers(schedule: NoiseSchedule, start: Tensor, steps: int) -> None:
    oracle = DDIMScheduler(
        **oracle_arguments(schedule), clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing"
    )
    oracle.alphas_cumprod = schedule.alphas_bar[1:]
    oracle.set_timesteps(steps)
    expected = oracle_run(oracle, start, nonlinear_model, eta=0.0)
    torch.testing.assert_close(run("ddim", steps, schedule, start, nonlinear_model), expected.float())


@pytest.mark.parametrize("steps", [7, 20, N])
def test_ddpm_follows_diffusers_with_the_same_noise(schedule: NoiseSchedule, start: Tensor, steps: int) -> None:
    oracle = DDPMScheduler(**oracle_arguments(schedule), clip_sample=False, variance_type="fixed_small")
    oracle.alphas_cumprod = schedule.alphas_bar[1:]
    if steps == N:
        oracle.set_timesteps(steps)
    else:
        oracle.set_timesteps(timesteps=[step.timestep - 1 for step in make_plan("ddpm", steps, schedule)])
    expected = oracle_run(oracle, start, nonlinear_model, generator=torch.Generator().manual_seed(3))
    actual = run("ddpm", steps, schedule, start, nonlinear_model, seed=3)
    torch.testing.assert_close(actual, expected.float(), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 7, 20, N])
def test_dpmpp_2m_follows_diffusers(schedule: NoiseSchedule, start: Tensor, steps: int) -> None:
    oracle = DPMSolverMultistepScheduler(
        **oracle_arguments(schedule),
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        final_sigmas_type="zero",
        lower_order_final=True,
    )
    oracle.alphas_cumprod = schedule.alphas_bar[1:]
    oracle.set_timesteps(timesteps=[step.timestep - 1 for step in make_plan("dpmpp_2m", steps, schedule)])
    expected = oracle_run(oracle, start, nonlinear_model)
    actual = run("dpmpp_2m", steps, schedule, start, nonlinear_model)
    # The oracle keeps its noise levels in fp32, ours are exact.
    torch.testing.assert_close(actual, expected.float(), atol=2e-4, rtol=1e-4)


def test_mean_is_the_first_estimate(schedule: NoiseSchedule, start: Tensor) -> None:
    assert torch.equal(run("mean", 1, schedule, start, nonlinear_model), nonlinear_model(start, N))


@pytest.mark.parametrize(("sampler", "steps"), [("ddpm", 200), ("ddim", 200), ("dpmpp_2m", 20)])
def test_gaussian_data_are_sampled_with_their_mean_and_spread(sampler: str, steps: int) -> None:
    mean, std = 1.5, 0.4
    schedule = NoiseSchedule(kind="cosine", num_timesteps=1000)

    def posterior_mean(noisy: Tensor, timestep: int) -> Tensor:
        alpha_bar = float(schedule.alphas_bar[timestep])
        gain = math.sqrt(alpha_bar) * std**2 / (alpha_bar * std**2 + 1 - alpha_bar)
        return mean + gain * (noisy - math.sqrt(alpha_bar) * mean)

    start = torch.randn(1, 200_000, generator=torch.Generator().manual_seed(0))
    samples = run(sampler, steps, schedule, start, posterior_mean)
    assert samples.mean().item() == pytest.approx(mean, abs=0.01)
    assert samples.std().item() == pytest.approx(std, rel=0.03)


@given(
    sampler=st.sampled_from(MULTISTEP),
    kind=st.sampled_from(["linear", "cosine"]),
    num_timesteps=st.integers(10, 300),
    data=st.data(),
)
def test_every_step_keeps_the_marginals_of_a_known_sample(
    sampler: str, kind: str, num_timesteps: int, data: st.DataObject
) -> None:
    """With the true x_0 as estimate, x_next has mean sqrt(abar) x_0 and variance 1 - abar."""
    schedule = NoiseSchedule(kind=kind, num_timesteps=num_timesteps)
    start = data.draw(st.integers(1, num_timesteps), label="start")
    steps = data.draw(st.integers(1, num_timesteps), label="steps")
    plan = make_plan(sampler, steps, schedule, start)
    assert len(plan) == min(steps, start)
    assert plan[0].timestep == start
    grid = [step.timestep for step in plan] + [0]
    assert all(a > b for a, b in itertools.pairwise(grid))
    for step, after in zip(plan, grid[1:], strict=True):
        now, then = float(schedule.alphas_bar[step.timestep]), float(schedule.alphas_bar[after])
        signal = step.keep * math.sqrt(now) + step.clean + step.previous
        variance = step.keep**2 * (1 - now) + step.noise**2
        assert signal == pytest.approx(math.sqrt(then), rel=1e-6, abs=1e-9)
        assert variance == pytest.approx(1 - then, rel=1e-6, abs=1e-9)


def test_no_noise_added_leaves_nothing_to_remove() -> None:
    assert make_plan("ddim", 5, NoiseSchedule(), start=0) == ()


@pytest.mark.parametrize("start", [-1, 1001])
def test_a_start_outside_the_schedule_is_refused(start: int) -> None:
    with pytest.raises(ValueError, match="allowed are 0 to 1000"):
        make_plan("ddim", 5, NoiseSchedule(), start=start)


def test_items_with_different_samplers_advance_together(start: Tensor) -> None:
    schedule = NoiseSchedule(num_timesteps=N)
    noise = torch.randn(2, 50)
    steps = [make_plan("ddpm", 10, schedule)[3], make_plan("dpmpp_2m", 6, schedule)[2]]
    clean, previous = nonlinear_model(start, 50), nonlinear_model(start, 70)
    together = take_steps(steps, start, clean, previous, noise)
    for i, step in enumerate(steps):
        row = slice(i, i + 1)
        alone = take_steps([step], start[row], clean[row], previous[row], noise[row])
        assert torch.equal(together[row], alone)


@pytest.mark.parametrize(
    ("sampler", "steps", "field", "message"),
    [
        ("euler", 1, "sampler", "choose one of mean, ddpm, ddim, dpmpp_2m"),
        ("", 1, "sampler", "choose one of"),
        ("ddim", 0, "steps", "allowed are 1 to 100"),
        ("ddim", -3, "steps", "allowed are 1 to 100"),
        ("ddim", N + 1, "steps", "allowed are 1 to 100"),
        ("ddpm", 10**6, "steps", "allowed are 1 to 100"),
        ("mean", 2, "steps", "exactly 1"),
    ],
)
def test_what_no_plan_exists_for_is_refused(sampler: str, steps: int, field: str, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message) as caught:
        check_sampler(sampler, steps, N)
    assert caught.value.field == field
    with pytest.raises(InvalidInputError):
        make_plan(sampler, steps, NoiseSchedule(num_timesteps=N))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_step_is_accepted_by_every_sampler(sampler: str) -> None:
    (step,) = make_plan(sampler, 1, NoiseSchedule(num_timesteps=N))
    assert (step.timestep, step.keep, step.clean, step.previous, step.noise) == (N, 0, 1, 0, 0)
