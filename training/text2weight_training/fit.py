"""Train the denoiser on a zoo.

Every step learns from two kinds of items. Zoo items: trained heads, standardised and noised to uniformly
drawn timesteps (L_diff and L_task). Fresh items: class combinations without a head, first denoised from
pure noise (L_task), then from their own first estimate noised to a drawn timestep (L_task again). The second
kind shows the denoiser what it meets while sampling, its own estimates instead of trained heads; without it
each further denoising step loses accuracy (exposure bias; docs/results.md has the figures).

The other losses and variants are switches of the preset, off by default: docs/method.md lists them.

Letters: B items (z of the zoo, then b fresh ones), K classes of a task (padded), P numbers in a head, h hidden units.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from text2weight.denoiser import Denoiser
from text2weight.samplers import make_plan
from text2weight.weight_space import WeightSpace
from text2weight_training.adversary import SAMPLER_CALLS, SAMPLES, Adversary, sample_heads
from text2weight_training.class_mixing import draw_class_mixing
from text2weight_training.files import TrainingDataError, atomic_path
from text2weight_training.fitted_checkpoint import write_fitted_checkpoint
from text2weight_training.given import GivenDraws, draw_given, partly_trained
from text2weight_training.loss_watch import DivergedError, LossWatch
from text2weight_training.losses import DenoisingLosses, TaskBatch, make_task_batch
from text2weight_training.output_start import output_start
from text2weight_training.presets import RESUMABLE, Preset, resume_obstacles
from text2weight_training.splits import draw_fresh_tasks, training_center
from text2weight_training.stacked import cosine_decay
from text2weight_training.symmetry import draw_orders, permute_each
from text2weight_training.tasks import PADDING, TaskData, TaskSplit, pad_tasks
from text2weight_training.teacher import teacher_answers
from text2weight_training.zoo import Zoo, check_zoo_fits

# Losses that break where the discriminator does; they stand behind the denoiser's own in a step's losses.
ADVERSARY_LOSSES = ("adversarial", "discriminator")


@dataclass
class FitState:
    """Where a fit stands: how many steps it made, and the seconds they took over all its runs."""

    step: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class StepDraws:
    """Everything random in one step.

    Attributes:
        batch: B tasks, those of the zoo first.
        clean: (z, P) zoo heads in the sampler's space.
        start: (b, P) pure noise for the fresh items.
        noise: (B, P) standard normal.
        timesteps: (B,) in 1..N.
        orders: (z, h) permutations for the equivariance loss, if it is on.
        given: of the heads to improve, if any are given.
        sampler: (k, s, P) noise of the sampler's runs for the discriminator, if there is one.
    """

    batch: TaskBatch
    clean: Tensor
    start: Tensor
    noise: Tensor
    timesteps: Tensor
    orders: Tensor | None
    given: GivenDraws | None
    sampler: Tensor | None


class Fit:
    """One training run of a denoiser, resumable from its last saved state."""

    def __init__(self, data: TaskData, zoo: Zoo, preset: Preset, state_file: Path, device: str | None = None) -> None:
        """Prepare the network and its optimiser.

        Args:
            data: features and embeddings, the ones the zoo was built from.
            zoo: the heads to learn from.
            preset: network, losses and optimiser.
            state_file: where progress is saved.
            device: "cpu" keeps it off an accelerator; otherwise accelerate decides.

        Raises:
            TrainingDataError: the zoo was built for other data or another head.
        """
        check_zoo_fits(zoo, data, preset)
        self.preset = preset
        self.state = FitState()
        self._state_file = state_file
        self._saved_step: int | None = None
        self._watch = LossWatch()
        self._accelerator = Accelerator(mixed_precision="bf16", cpu=device == "cpu")
        target = self._accelerator.device
        self.space = WeightSpace.fit(preset.head, zoo.universal, zoo.weights, preset.scaling)
        self._split: TaskSplit = zoo.split
        self._data = data.to(target)
        # bf16 halves what every step gathers; the losses take the first product of a head in it.
        self._features = replace(self._data.train, features=self._data.train.features.bfloat16())
        self._zoo_tasks = pad_tasks(zoo.split.seen).to(target)  # (n, K)
        self._zoo_clean = self.space.standardise(zoo.weights).to(target)  # (n, P)
        self._starts = self.space.standardise(torch.stack([zoo.universal, zoo.base])).to(target)  # (2, P)
        torch.manual_seed(preset.seed)
        center = training_center(data.condition_embeddings, zoo.split)  # (D,)
        start = output_start(preset, self.space, zoo.weights)
        self.denoiser = Denoiser(preset.head, preset.denoiser, self.space.anchor, center, start)
        self.average = Denoiser(preset.head, preset.denoiser, self.space.anchor, center, start).to(target)
        self.average.load_state_dict(self.denoiser.state_dict())
        optimizer = torch.optim.AdamW(
            _decay_groups(self.denoiser, preset.fit.weight_decay), lr=preset.fit.learning_rate, betas=(0.9, 0.98)
        )
        self._model, self._optimizer = self._accelerator.prepare(self.denoiser, optimizer)
        self._losses = DenoisingLosses(
            preset.head,
            self.space.to(target),
            preset.schedule,
            preset.prediction,
            preset.logit_scale,
            preset.fit.label_smoothing,
            preset.fit.teacher.share if preset.fit.teacher else 0.0,
        )
        self._answers = self._ask_teacher(zoo.split)
        self.adversary: Adversary | None = None
        if preset.fit.adversarial_weight:
            size, limit = self._zoo_clean.shape[1], float(self._zoo_clean.abs().max())
            self.adversary = Adversary(size, limit, preset.fit.discriminator_learning_rate, self._accelerator)
            self._plan = make_plan(preset.sampler, min(preset.steps, SAMPLER_CALLS), preset.schedule)

    def run(self, minutes: float | None = None) -> None:
        """Train to the end: the preset's number of steps, or a time limit.

        Args:
            minutes: wall time of all runs of this fit together; replaces the preset's step count.

        Raises:
            TrainingDataError: a loss or the gradient is no longer finite, or the loss exploded; the last saved state,
                which is from before that, is kept.
        """
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, disable=not self._accelerator.is_main_process) as progress:
            bar = progress.add_task("fit", total=1.0)
            while (done := self._progress(minutes)) < 1:
                started = time.monotonic()
                losses = self._step(done)
                self.state.step += 1
                self.state.seconds += time.monotonic() - started
                self._watch.add(self._check(losses))
                if self.state.step % self.preset.fit.save_every == 0:
                    self.save()
                    if self._accelerator.is_main_process:
                        progress.console.print(self._describe(losses), soft_wrap=True)
                progress.update(bar, completed=done, description=f"fit step {self.state.step}")
        if self._saved_step != self.state.step:
            self.save()

    def _ask_teacher(self, split: TaskSplit) -> Tensor | None:
        """A teacher's logits for all training features (N, C), where the preset has one; trained on first use."""
        settings = self.preset.fit.teacher
        if settings is None:
            return None
        with self._accelerator.main_process_first(), Progress(disable=not self._accelerator.is_main_process) as bar:
            task = bar.add_task("teacher", total=1.0)
            return teacher_answers(
                self._data,
                split,
                settings,
                self.preset.seed,
                self._state_file.with_name("teacher.safetensors"),
                lambda done: bar.update(task, completed=done),
            ).to(self._accelerator.device)

    def _progress(self, minutes: float | None) -> float:
        if minutes is None:
            return self.state.step / self.preset.fit.steps
        # The processes' clocks differ a little; all of them must make the same number of steps.
        spent = torch.tensor(self.state.seconds, device=self._accelerator.device)
        return float(self._accelerator.reduce(spent, "mean")) / (60 * minutes)

    def _describe(self, losses: dict[str, Tensor]) -> str:
        values = "  ".join(f"{name} {float(value):.4f}" for name, value in losses.items())
        return f"step {self.state.step}  {self.state.seconds:.0f} s  {values}"

    def _check(self, losses: dict[str, Tensor]) -> float:
        """The loss to watch, the same for all processes, once it and all the others are found sound."""
        # The adversary's part is left out: its size is up to the discriminator, and grows where that wins.
        watched = self._denoiser_total(losses).detach()
        broken = [name for name, value in losses.items() if not math.isfinite(float(value))]
        loss = float(self._accelerator.reduce(watched * math.nan if broken else watched, "mean"))
        complaint = f"{broken[0]} is not finite" if broken else self._watch.complaint(loss)
        if complaint:
            saved = self._saved_step
            kept = "no state was saved"
            if saved is not None:
                kept = f"the state of step {saved} is kept in {self._state_file}, to go on from with the new rate"
            rate = "discriminator_learning_rate" if broken and broken[0] in ADVERSARY_LOSSES else "learning_rate"
            raise DivergedError(f"{complaint} at step {self.state.step}: lower fit.{rate}; {kept}")
        return loss

    def _step(self, done: float) -> dict[str, Tensor]:
        settings = self.preset.fit
        factor = learning_rate_factor(done, settings.warmup)
        for group in self._optimizer.param_groups:
            group["lr"] = settings.learning_rate * factor
        losses = self._compute_losses(self._next_draws())
        total = self._total(losses)
        self._optimizer.zero_grad(set_to_none=True)
        self._accelerator.backward(total)
        # Checked with the losses: a broken gradient breaks the weights while the loss still looks sound.
        norm = self._accelerator.clip_grad_norm_(self._model.parameters(), settings.gradient_clip)
        losses["gradient norm"] = torch.as_tensor(norm)
        self._optimizer.step()
        self._update_average()
        if self.adversary is not None:
            losses["discriminator"] = self.adversary.step(factor, settings.gradient_clip)
        return {name: value.detach() for name, value in losses.items()}

    def _next_draws(self) -> torch.Generator:
        """One generator per step and process: a resumed run draws what an undisturbed one would."""
        seed = (self.preset.seed * 1_000_003 + self.state.step) * 4096 + self._accelerator.process_index
        return torch.Generator().manual_seed(seed)

    def _total(self, losses: dict[str, Tensor]) -> Tensor:
        """The weighted sum of the losses that are on."""
        total = self._denoiser_total(losses)
        if weight := self.preset.fit.adversarial_weight:
            total = total + weight * losses["adversarial"]
        return total

    def _denoiser_total(self, losses: dict[str, Tensor]) -> Tensor:
        """The same without the adversarial loss."""
        settings = self.preset.fit
        total = settings.diffusion_weight * losses["diffusion"]
        if settings.task_weight:
            task = [losses[name] for name in ("first call", "later calls") if name in losses]
            total = total + settings.task_weight * sum(task[1:], task[0])
        if settings.symmetry_weight:
            total = total + settings.symmetry_weight * losses["symmetry"]
        return total

    def _draw(self, generator: torch.Generator) -> StepDraws:
        """Draw a step's items; what a switch needs comes last, so that it leaves the other draws as they are."""
        settings, spec, device = self.preset.fit, self.preset.head, self._zoo_clean.device
        chosen = torch.randint(len(self._zoo_clean), (settings.zoo_batch,), generator=generator).to(device)
        clean, tasks = self._zoo_clean[chosen], self._zoo_tasks[chosen]  # (z, P), (z, K)
        if fresh := settings.fresh_items:
            drawn = draw_fresh_tasks(
                self._split, len(self._data.classes), fresh, settings.fresh_task_size, generator
            ).to(device)
            tasks = _stack_tasks(tasks, drawn)  # (B, K), zoo items first
        samples = settings.samples if settings.task_weight else 0
        data, mixing = self._data, None
        if settings.class_mixing:
            is_fresh = torch.arange(len(tasks), device=device) >= len(clean)  # (B,)
            mixing = draw_class_mixing(
                tasks, is_fresh, len(data.classes), self._split.held_out, settings.class_mixing, generator
            )
        batch = make_task_batch(
            tasks,
            data.embeddings,
            data.condition_embeddings,
            self._features,
            samples,
            generator,
            settings.feature_dropout,
            self._answers if samples else None,
            mixing,
        )
        start = torch.randn(fresh, clean.shape[1], generator=generator).to(device)  # (b, P)
        noise = torch.randn(len(tasks), clean.shape[1], generator=generator).to(device)  # (B, P)
        steps = torch.randint(1, self.preset.schedule.num_timesteps + 1, (len(tasks),), generator=generator)  # (B,)
        if settings.condition_dropout:
            dropped = torch.rand(len(tasks), generator=generator) < settings.condition_dropout  # (B,)
            batch = batch.drop_condition(dropped.to(device))
        if settings.permute_units:
            # The noise moves with its head, so that the target is g epsilon: the pair is that of g x_n.
            moves = draw_orders(spec, len(clean), generator).to(device)  # (z, h)
            clean = permute_each(spec, clean, moves)
            noise = torch.cat([permute_each(spec, noise[: len(clean)], moves), noise[len(clean) :]])
        orders = draw_orders(spec, len(clean), generator).to(device) if settings.symmetry_weight else None
        given = None
        if settings.given_share:
            starts, size = self._starts.shape
            given = draw_given(len(clean), size, starts, settings.given_share, generator).to(device)
        sampler = None
        if self.adversary is not None:
            sampler = torch.randn(len(self._plan), SAMPLES, clean.shape[1], generator=generator).to(device)  # (k, s, P)
        return StepDraws(batch, clean, start, noise, steps.to(device), orders, given, sampler)

    def _compute_losses(self, generator: torch.Generator) -> dict[str, Tensor]:
        settings, schedule = self.preset.fit, self.preset.schedule
        draws = self._draw(generator)
        batch, clean = draws.batch, draws.clean
        is_fresh = torch.arange(len(draws.noise), device=clean.device) >= len(clean)  # (B,)
        fresh_rows = is_fresh.nonzero().squeeze(1)  # (b,)
        losses: dict[str, Tensor] = {}
        first = draws.start  # (b, P)
        if len(fresh_rows):
            last = torch.full((len(fresh_rows),), schedule.num_timesteps, device=clean.device)  # (b,)
            _, first = schedule.run_denoiser(
                self._model, self.preset.prediction, draws.start, last, batch.condition.select(fresh_rows)
            )  # (b, P)
            clean = torch.cat([clean, first.detach()])  # (B, P)
        condition = batch.condition
        if draws.given is not None:
            given = partly_trained(draws.given, self._starts, draws.clean, len(fresh_rows))
            condition = replace(condition, given=given)
        denoised = self._losses.denoise(self._model, clean, draws.timesteps, draws.noise, condition)
        losses["diffusion"] = self._losses.diffusion(denoised, clean, draws.noise, only=~is_fresh)
        if settings.task_weight and len(fresh_rows):
            losses["first call"] = self._losses.task(first, batch.select(fresh_rows))
        if settings.task_weight:
            losses["later calls"] = self._losses.task(denoised.estimate, batch)
        if draws.orders is not None:
            losses["symmetry"] = self._losses.symmetry(self._model, denoised, draws.orders)
        if self.adversary is not None and draws.sampler is not None:
            # One-shot estimates of noised zoo heads and, of fresh items, of pure noise and of the renoised first ones.
            fakes = torch.cat([denoised.estimate, first])  # (B + b, P)
            items = batch.condition.select(torch.arange(SAMPLES, device=clean.device) % len(draws.clean))
            samples = sample_heads(
                self._model, self._plan, schedule, self.preset.prediction, draws.sampler, items
            )  # (s, P)
            losses["adversarial"] = self.adversary.loss(draws.clean, fakes, samples)
        return losses

    @torch.no_grad()
    def _update_average(self) -> None:
        step = self.state.step
        decay = min(self.preset.fit.ema_decay, (1 + step) / (10 + step))
        for kept, live in zip(self.average.parameters(), self.denoiser.parameters(), strict=True):
            kept.lerp_(live.detach(), 1 - decay)

    def save(self) -> None:
        """Write the state, whole or not at all.

        The step's losses were those of the weights before it: what the step made of them is judged by the losses that
        the next step will begin with.

        Raises:
            TrainingDataError: those losses are not sound, see `run`; the last state stays.
            OSError: it cannot be written, as on a full disk; likewise.
        """
        with torch.no_grad():
            self._check(self._compute_losses(self._next_draws()))
        if self._accelerator.is_main_process:
            self._write_state()
        self._saved_step = self.state.step

    def _write_state(self) -> None:
        state: dict[str, Any] = {
            "preset": self.preset.run_description(),
            "data": self._data.fingerprint,
            "condition_text": self._data.condition_fingerprint,
            "step": self.state.step,
            "seconds": self.state.seconds,
            "losses": self._watch.losses,
            "starts": self.denoiser.start is not None,
            "denoiser": self.denoiser.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }
        if self.adversary is not None:
            state["adversary"] = self.adversary.state_dict()
        try:
            with atomic_path(self._state_file) as temporary:
                torch.save(state, temporary)
        except RuntimeError as error:  # what torch makes of the operating system's errors
            raise OSError(f"{self._state_file} cannot be written, the disk may be full: {error}") from error

    def resume(self) -> bool:
        """Go on from the saved state, if there is one; with a preset that may differ from its own in `RESUMABLE`.

        Returns:
            whether there was.

        Raises:
            TrainingDataError: the state is damaged, or belongs to another preset or other data.
        """
        if not self._state_file.exists():
            return False
        try:
            state = torch.load(self._state_file, map_location="cpu", weights_only=True)
            # States that are older than condition texts lack the key, and had none.
            there = {"data": state["data"], "condition texts": state.get("condition_text", "")}
            differing = resume_obstacles(state["preset"], self.preset.run_description())
        except Exception as error:  # torch raises many kinds for a damaged file
            raise TrainingDataError(f"{self._state_file} is damaged ({error}): remove it to start anew") from error
        here = {"data": self._data.fingerprint, "condition texts": self._data.condition_fingerprint}
        differing += [what for what, fingerprint in here.items() if there[what] != fingerprint]
        if differing:
            raise TrainingDataError(
                f"{self._state_file} belongs to a fit with other {', '.join(differing)}: give what it was begun with, "
                f"or remove it to start anew; only {', '.join(RESUMABLE)} may change on the way"
            )
        self.denoiser.load_state_dict(state["denoiser"])
        self.average.load_state_dict(state["average"])
        self._optimizer.load_state_dict(state["optimizer"])
        if not state.get("starts", False):  # the network has learnt with nothing added to its output
            self.denoiser.start = self.average.start = None
        if self.adversary is not None:
            self.adversary.load_state_dict(state["adversary"])
        self.state = FitState(state["step"], state["seconds"])
        self._saved_step = self.state.step
        # States that are older than the watch lack its losses: it begins anew.
        self._watch = LossWatch(state.get("losses", ()))
        return True

    def write_checkpoint(self, out: Path, backbone: Path | None = None) -> None:
        """Write the averaged denoiser as a checkpoint directory.

        A local text encoder, condition texts and a backbone folder are copied in, so the checkpoint needs nothing else.

        Args:
            out: the checkpoint directory.
            backbone: folder of the backbone the features were made with.
        """
        if not self._accelerator.is_main_process:
            return
        write_fitted_checkpoint(out, self.preset, self._data, self._split, self.average, self.space, backbone)


def learning_rate_factor(done: float, warmup: float) -> float:
    """Linear warm-up over the first share of a run, then a cosine to zero; `done` in 0..1."""
    if done < warmup:
        return (done + 1e-3) / (warmup + 1e-3)
    return cosine_decay((done - warmup) / (1 - warmup))


def _stack_tasks(first: Tensor, second: Tensor) -> Tensor:
    widest = max(first.shape[1], second.shape[1])
    padded = [torch.nn.functional.pad(tasks, (0, widest - tasks.shape[1]), value=PADDING) for tasks in (first, second)]
    return torch.cat(padded)  # (B, K)


def _decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
