"""From class names to head artifacts: read this file first, it calls every stage in order.

    class names --text_encoder--> embeddings (K, D) --condition--> pooled vector and class tokens
        --samplers, denoiser--> standardised weights (P) --weight_space--> flat weights --head, artifact--> bytes

The samplers begin at noise. To enhance a head, the generated one is averaged with it, or the samplers begin at that
head with noise on it (`enhancement`). `begin`, `advance` and `finish` are the stages of one request, so that a service
can let requests join and leave between denoiser calls (`sampling`); `generate_batch` calls them for requests that begin
together.

Letters: B requests, K classes, D embedding size, P numbers in one head.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from text2weight.artifact import FORMAT, HeadArtifact, created_by
from text2weight.checkpoint import Checkpoint, CheckpointConfig, load_checkpoint
from text2weight.condition import (
    condition_of_task,
    emphasis_of_tasks,
    normalise_class_names,
    normalise_tasks,
    union_of_tasks,
)
from text2weight.cuda_graphs import GraphedDenoiser
from text2weight.descriptions import ConditionText, Descriptions, describe_classes
from text2weight.enhancement import EnhanceMethod, check_fits, check_given, choose_method, choose_start, heads_to_read
from text2weight.errors import CheckpointError, InvalidInputError
from text2weight.outside import OutsideNames
from text2weight.samplers import check_sampler, make_plan
from text2weight.sampling import Denoiser, Sample, advance
from text2weight.text_encoder import TEMPLATE_PATTERN, TextEncoder, load_text_encoder
from text2weight.traced import TracedDenoiser

MAX_SEED = 2**63 - 1
# A checkpoint's own text encoder lies in this folder of it.
BUNDLED_TEXT_ENCODER = "text_encoder"
# And so do the texts that its condition was made from, where they are others.
BUNDLED_CONDITION_TEXT = "condition_text"
MAX_GUIDANCE_SCALE = 20.0
MAX_TEMPLATE_LENGTH = 200
DEFAULT_STEPS = 20  # of a sampler that the checkpoint names no step count for


def _inside(checkpoint: Path, source: str) -> str:
    """A text encoder's source, with a place inside the checkpoint made absolute."""
    kind, _, place = source.partition(":")
    inside = place.startswith((BUNDLED_TEXT_ENCODER, BUNDLED_CONDITION_TEXT))
    return f"{kind}:{checkpoint / place}" if inside else source


@dataclass(frozen=True)
class GenerationRequest:
    """One head to generate, or a given one to enhance.

    Attributes:
        classes: normalised class names.
        embeddings: (K, D) L2-normalised text embeddings of the classes' prompts, in the same order.
        seed: 0..2**63 - 1; equal requests give equal heads.
        steps: number of denoiser calls.
        sampler: one of `samplers.SAMPLERS`.
        guidance_scale: s of classifier-free guidance, 0..20; 1 is the condition alone and costs nothing, other
            values need a checkpoint trained with condition dropout and twice the computation.
        given: (P,) fp32 flat weights of the head to enhance, its hidden units in any order; None to generate one.
        strength: how far to go from the given head. At 0 it comes back bit for bit; at 1 nothing is left of it, and the
            head is that of plain generation.
        method: between, "interpolate" goes a share of the way to the head of plain generation; "noise" noises the given
            head by that share of the schedule and denoises it, by `steps` calls or as many as there are timesteps
            below ("mean" makes its one call there). None takes what suits the head: `enhancement.choose_method`.
        condition_text: what the denoiser reads in place of `embeddings`, such as descriptions of the classes; None
            for what the checkpoint was trained with.
        emphasis: (K,) positive factors of the classes' shares in the pooled condition; None for equal ones.
        template: of the prompts that `embeddings` were made from; None for the checkpoint's.
    """

    classes: tuple[str, ...]
    embeddings: Tensor
    seed: int = 0
    steps: int = 1
    sampler: str = "mean"
    guidance_scale: float = 1.0
    given: Tensor | None = None
    strength: float = 1.0
    method: EnhanceMethod | None = None
    condition_text: ConditionText | None = None
    emphasis: Tensor | None = None
    template: str | None = None


@dataclass(frozen=True)
class DenoiserCall:
    """What one denoiser call of a batch was shown and what it answered, as flat head weights on the CPU.

    Hidden units are in the weight space's order, those of a given head too.

    Attributes:
        items: positions in the batch of the b requests that made this call.
        timesteps: (b,) n.
        samples: (b, P) x_n, before the call.
        estimates: (b, P) the estimates of x_0, as far from the anchor as the sampled head would be.
    """

    items: tuple[int, ...]
    timesteps: Tensor
    samples: Tensor
    estimates: Tensor


class Generator:
    """A loaded checkpoint and its text encoder; safe to share between threads."""

    def __init__(self, checkpoint: Checkpoint, text_encoder: TextEncoder, device: str = "cpu") -> None:
        """Put a checkpoint on a device.

        Raises:
            CheckpointError: the text encoder is not the one the checkpoint was trained with.
        """
        self.config: CheckpointConfig = checkpoint.config
        self.checkpoint_hash = checkpoint.config.sha256
        self.text_encoder = text_encoder
        self.device = device
        self.path = checkpoint.path
        described = checkpoint.config.condition_text
        self._condition_encoder = load_text_encoder(_inside(self.path, described.source)) if described else None
        self._denoiser = checkpoint.denoiser.to(device).requires_grad_(False)
        self._on_cuda = torch.device(device).type == "cuda"
        self._call: Denoiser = GraphedDenoiser(self._denoiser) if self._on_cuda else TracedDenoiser(self._denoiser)
        self._space = checkpoint.space.to(device)
        self._space_on_cpu = checkpoint.space.to("cpu")
        expected = checkpoint.config.text_encoder
        if expected.fingerprint and expected.fingerprint != text_encoder.fingerprint:
            raise CheckpointError(
                f"text encoder {text_encoder.name} is not the {expected.name} that {checkpoint.path} was trained with"
            )
        if text_encoder.embedding_dim != checkpoint.config.denoiser.embedding_dim:
            raise CheckpointError(
                f"text encoder {text_encoder.name} gives {text_encoder.embedding_dim} numbers per text, "
                f"the checkpoint takes {checkpoint.config.denoiser.embedding_dim}"
            )
        self._outside = self._learn_names()

    @classmethod
    def load(cls, path: str | Path, *, device: str = "cpu", text_encoder: TextEncoder | None = None) -> Generator:
        """Load a checkpoint directory or "hf:owner/name@revision".

        Args:
            path: the checkpoint.
            device: torch device for the denoiser and the text encoder.
            text_encoder: used in place of the one the checkpoint names.

        Raises:
            CheckpointError: the checkpoint or its text encoder is missing, damaged or does not fit.
        """
        checkpoint = load_checkpoint(path)
        if text_encoder is None:
            text_encoder = load_text_encoder(_inside(checkpoint.path, checkpoint.config.text_encoder.source), device)
        return cls(checkpoint, text_encoder, device)

    def generate(
        self,
        classes: Sequence[str],
        *,
        seed: int = 0,
        steps: int | None = None,
        sampler: str | None = None,
        guidance_scale: float = 1.0,
        descriptions: Descriptions | None = None,
        describe_classifier: bool = False,
    ) -> HeadArtifact:
        """Generate a head for class names.

        Args:
            classes: names, at least 2.
            seed: 0..2**63 - 1.
            steps: denoiser calls; the checkpoint's default where not given.
            sampler: likewise.
            guidance_scale: see `GenerationRequest`.
            descriptions: a text, or a list of texts to average, for each class: what the denoiser reads in place of
                the names' prompts.
            describe_classifier: make the artifact's class embeddings from the descriptions, too.

        Raises:
            InvalidInputError: `field` says which argument, the message what is allowed.
        """
        request = self._request(classes, seed, steps, sampler, guidance_scale)
        if descriptions is not None:
            text = describe_classes(descriptions, request.classes, self.text_encoder, describe_classifier)
            embeddings = text.embeddings if describe_classifier else request.embeddings
            request = replace(request, embeddings=embeddings, condition_text=text)
        elif describe_classifier:
            raise InvalidInputError("descriptions", "describe_classifier needs descriptions: give one for each class")
        return self.generate_batch([request])[0]

    def enhance(
        self,
        head: HeadArtifact,
        classes: Sequence[str],
        *,
        strength: float,
        method: EnhanceMethod | None = None,
        seed: int = 0,
        steps: int | None = None,
        sampler: str | None = None,
        guidance_scale: float = 1.0,
    ) -> HeadArtifact:
        """Improve a given head, such as one that was trained for a short while, for class names.

        Args:
            head: of the layout that the checkpoint generates, trained on features of the checkpoint's backbone; its
                classes and metadata are not read.
            classes: names, at least 2.
            strength: 0..1, how little of the head is kept; see `GenerationRequest`.
            method: likewise.
            seed: 0..2**63 - 1.
            steps: denoiser calls; the checkpoint's default where not given.
            sampler: likewise.
            guidance_scale: see `GenerationRequest`.

        Returns:
            the head with its hidden units in the order of the given one's; at strength 1 in the checkpoint's.

        Raises:
            InvalidInputError: `field` says which argument, the message what is allowed.
        """
        check_fits(self.config.head, head.spec)
        request = self._request(classes, seed, steps, sampler, guidance_scale)
        given = self.config.head.flatten(head.tensors)  # (P,)
        request = replace(request, given=given, strength=strength, method=method)
        return self.generate_batch([request])[0]

    def fuse(
        self,
        tasks: Sequence[Sequence[str]],
        *,
        weights: Sequence[float] | None = None,
        seed: int = 0,
        steps: int | None = None,
        sampler: str | None = None,
        guidance_scale: float = 1.0,
    ) -> HeadArtifact:
        """Generate one head for the classes of several tasks, each class once, in order of first appearance.

        Args:
            tasks: class names of each task.
            weights: positive factors of the tasks' shares in the pooled condition; equal ones where not given.
            seed: 0..2**63 - 1.
            steps: denoiser calls; the checkpoint's default where not given.
            sampler: likewise.
            guidance_scale: see `GenerationRequest`.

        Raises:
            InvalidInputError: `field` says which argument, the message what is allowed.
        """
        names = normalise_tasks(tasks)
        emphasis = None if weights is None else emphasis_of_tasks(names, weights)
        request = self._request(union_of_tasks(names), seed, steps, sampler, guidance_scale)
        return self.generate_batch([replace(request, emphasis=emphasis)])[0]

    def _learn_names(self) -> OutsideNames | None:
        """What tells the names of training from others, where the checkpoint treats those apart."""
        settings, names = self.config.outside, self.config.classes
        if settings is None:
            return None
        try:
            if self._condition_encoder is not None:
                return OutsideNames(settings, names, self._condition_encoder.encode(names))
            return OutsideNames(settings, names, self.text_encoder.encode(self.prompts(names)))
        except InvalidInputError as error:
            raise CheckpointError(f"{self.path} was trained on names that its text encoder lacks: {error}") from error

    def _request(
        self, classes: Sequence[str], seed: int, steps: int | None, sampler: str | None, guidance_scale: float
    ) -> GenerationRequest:
        names = normalise_class_names(classes)
        embeddings = self.text_encoder.encode(self.prompts(names))  # (K, D)
        sampler, steps = self.resolve_sampling(sampler, steps)
        return GenerationRequest(names, embeddings, seed, steps, sampler, guidance_scale)

    @property
    def anchor(self) -> Tensor:
        """(P,) the head that the weight space measures deviations from, on the CPU: the zoo's universal head."""
        return self._space_on_cpu.anchor

    @property
    def calls_at_once(self) -> int:
        """How many threads should call `advance`, with equal shares of torch's: one computes while another does not."""
        return 1 if self._on_cuda or torch.get_num_threads() == 1 else 2

    @property
    def denoiser_parameters(self) -> int:
        """How many parameters the denoiser has."""
        return sum(parameter.numel() for parameter in self._denoiser.parameters())

    def prompts(self, classes: Sequence[str], template: str | None = None) -> list[str]:
        """Put class names into a prompt template, the checkpoint's where none is given.

        Raises:
            InvalidInputError: field "prompt_template"; it has to hold one {} for the name and nothing else in braces.
        """
        if template is None:
            template = self.config.template
        elif len(template) > MAX_TEMPLATE_LENGTH or not re.fullmatch(TEMPLATE_PATTERN, template):
            raise InvalidInputError(
                "prompt_template",
                f"prompt_template is {template[:MAX_TEMPLATE_LENGTH]!r}: one {{}} must stand for the name, no other "
                f"braces, at most {MAX_TEMPLATE_LENGTH} characters",
            )
        return [template.format(name) for name in classes]

    def resolve_sampling(self, sampler: str | None, steps: int | None) -> tuple[str, int]:
        """Fill in the checkpoint's sampler and steps where a caller gave none.

        A step count without a sampler asks for DDIM where the default sampler makes only one call.
        """
        if sampler is None:
            sampler = "ddim" if self.config.sampler == "mean" and steps not in (None, 1) else self.config.sampler
        if steps is None:
            many = min(DEFAULT_STEPS, self.config.schedule.num_timesteps)
            steps = self.config.steps if sampler == self.config.sampler else (1 if sampler == "mean" else many)
        return sampler, steps

    def check(self, request: GenerationRequest) -> None:
        """Refuse a request that cannot be computed.

        Raises:
            InvalidInputError: `field` says which part, the message what is allowed.
        """
        if not 0 <= request.seed <= MAX_SEED:
            raise InvalidInputError("seed", f"seed is {request.seed}: allowed are 0 to {MAX_SEED}")
        check_sampler(request.sampler, request.steps, self.config.schedule.num_timesteps)
        self._check_guidance(request.guidance_scale)
        check_given(self.config.head, self._space_on_cpu, request.given, request.strength, request.method)
        if request.emphasis is not None and tuple(request.emphasis.shape) != (len(request.classes),):
            raise InvalidInputError("tasks", f"emphasis is {tuple(request.emphasis.shape)}: give one factor per class")
        expected = (len(request.classes), self.config.denoiser.embedding_dim)
        if tuple(request.embeddings.shape) != expected:
            raise InvalidInputError("classes", f"embeddings are {tuple(request.embeddings.shape)}, expected {expected}")
        read = tuple(self._condition_embeddings(request).shape)
        if read != expected:
            raise InvalidInputError("descriptions", f"embeddings of the condition are {read}, expected {expected}")

    def _read(self, request: GenerationRequest) -> Tensor:
        """What the denoiser is shown, (K, D): condition embeddings, those of outside names mixed from known ones."""
        rows = self._condition_embeddings(request).float()
        return rows if self._outside is None else self._outside.read(request.classes, rows)

    def _condition_embeddings(self, request: GenerationRequest) -> Tensor:
        """What the denoiser reads, (K, D): the request's own choice, the checkpoint's texts, or class embeddings."""
        if request.condition_text is not None:
            return request.condition_text.embeddings
        if self._condition_encoder is not None:
            return self._condition_encoder.encode(request.classes)
        return request.embeddings

    def _check_guidance(self, scale: float) -> None:
        if not 0 <= scale <= MAX_GUIDANCE_SCALE:  # not a number is refused too
            raise InvalidInputError(
                "guidance_scale", f"guidance_scale is {scale}: allowed are 0 to {MAX_GUIDANCE_SCALE:g}"
            )
        if scale != 1 and not self.config.denoiser.null_condition:
            raise InvalidInputError(
                "guidance_scale",
                f"guidance_scale is {scale}: this checkpoint was trained without condition dropout, only 1 is allowed",
            )

    def begin(self, request: GenerationRequest) -> Sample:
        """Begin a request's reverse diffusion; `advance` moves it on.

        Raises:
            InvalidInputError: see `check`.
        """
        self.check(request)
        embeddings = self._read(request)  # (K, D)
        condition = condition_of_task(embeddings, request.emphasis)
        given = None if request.given is None else request.given.detach().cpu()  # (P,)
        if given is not None and request.method is None:
            request = replace(request, method=choose_method(self.config.head, self.anchor, given))
        schedule = self.config.schedule
        start = choose_start(self.config.head, self._space_on_cpu, schedule, given, request.strength, request.method)
        if self.config.denoiser.reads_given:
            condition = replace(condition, given=heads_to_read([start], self.config.head.num_parameters))
        source = torch.Generator().manual_seed(request.seed)
        noise = torch.randn(self.config.head.num_parameters, generator=source)  # (P,)
        noisy = start.sample(schedule, noise).to(self.device)  # (P,)
        plan = make_plan(request.sampler, request.steps, schedule, start.timestep)
        return Sample(request, start, plan, source, condition.to(self.device), noisy, torch.zeros_like(noisy))

    def advance(self, samples: Sequence[Sample], rows: int | None = None) -> None:
        """Make the next denoiser call of each sample, all in one. Several threads may, each with its own samples.

        Args:
            samples: at least one, none of them done; they may differ in everything.
            rows: size of the call, at least the number of samples; that number where not given.

        Raises:
            Whatever the device raises; then no sample has moved, and the call may be made again.
        """
        with torch.inference_mode():
            advance(samples, self._call, self.config.schedule, self.config.prediction, rows or len(samples))

    def finish(self, sample: Sample) -> HeadArtifact:
        """The head of a sample that is done."""
        return self._to_head(sample, sample.noisy)

    def preview(self, sample: Sample) -> HeadArtifact:
        """The head that the last denoiser call of a sample estimated, to watch a sampler at work."""
        return self._to_head(sample, sample.estimate)

    def generate_batch(
        self,
        requests: Sequence[GenerationRequest],
        *,
        on_call: Callable[[DenoiserCall], None] | None = None,
    ) -> list[HeadArtifact]:
        """Generate and enhance several heads in one reverse diffusion.

        Requests may differ in everything; one with fewer steps leaves the batch when it is done.

        Args:
            requests: at least one.
            on_call: called after each with its samples and estimates, to watch a sampler at work.

        Raises:
            InvalidInputError: see `check`.
        """
        samples = [self.begin(request) for request in requests]
        while active := [i for i, sample in enumerate(samples) if not sample.done]:
            timesteps = torch.tensor([samples[i].step.timestep for i in active])  # (b,)
            before = [samples[i].noisy for i in active]  # b of (P,)
            self.advance([samples[i] for i in active])
            if on_call is not None:
                shown = self._space.restore(torch.stack(before)).cpu()  # (b, P)
                estimates = torch.stack([self._to_weights(samples[i], samples[i].estimate) for i in active])  # (b, P)
                on_call(DenoiserCall(tuple(active), timesteps, shown, estimates))
        return [self.finish(sample) for sample in samples]

    def _reach(self, sample: Sample) -> float:
        """How far a sample's head goes from the anchor to what the denoiser answers; 1 is all the way.

        A given head that is noised is an end of its own: `strength` says how far to go from there.
        """
        plain = sample.start.timestep == self.config.schedule.num_timesteps
        return self._outside.reach(sample.request.classes) if self._outside is not None and plain else 1.0

    def _to_head(self, sample: Sample, numbers: Tensor) -> HeadArtifact:
        """A sample's head from numbers (P,) in the sampler's space."""
        weights = sample.start.finish(self.config.head, self._to_weights(sample, numbers))  # (P,)
        return self._to_artifact(sample.request, weights, self._reach(sample))

    def _to_weights(self, sample: Sample, numbers: Tensor) -> Tensor:
        """Flat weights (P,) on the CPU from numbers (P,) in the sampler's space."""
        return self._space.restore(numbers, self._reach(sample)).cpu()

    def _to_artifact(self, request: GenerationRequest, weights: Tensor, reach: float) -> HeadArtifact:
        tensors = {name: tensor.clone() for name, tensor in self.config.head.unflatten(weights).items()}
        metadata = {
            "format": FORMAT,
            "classes": json.dumps(list(request.classes), ensure_ascii=False),
            "template": request.template or self.config.template,
            "logit_scale": repr(self.config.logit_scale),
            "activation": self.config.head.activation,
            "seed": str(request.seed),
            "steps": str(request.steps),
            "sampler": request.sampler,
            "checkpoint": self.checkpoint_hash,
            "text_encoder": self.text_encoder.name,
            "backbone": str(self.config.backbone.get("name", "unknown")),
            "created_by": created_by(),
        }
        if request.guidance_scale != 1:
            metadata["guidance_scale"] = repr(float(request.guidance_scale))
        if self._outside is not None and (outside := self._outside.among(request.classes)):
            metadata["outside"] = json.dumps(outside, ensure_ascii=False)
        if reach != 1:
            metadata["reach"] = repr(reach)
        if request.given is not None:
            metadata |= {"strength": repr(float(request.strength)), "method": str(request.method)}
        if request.condition_text is not None:
            metadata["condition_text"] = request.condition_text.source
            if request.condition_text.in_classifier:
                metadata["class_text"] = request.condition_text.source
        elif self._condition_encoder is not None:
            metadata["condition_text"] = self._condition_encoder.name
        # A copy: the request's embeddings may sit in a cache that other requests read.
        embeddings = request.embeddings.to("cpu", torch.float32, copy=True)  # (K, D)
        return HeadArtifact(tensors, embeddings, metadata)
