"""What a caller asks of the engine, and what has to be embedded and computed for it.

Letters: K classes, D embedding size, P numbers in one head.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from pydantic_core import to_json
from torch import Tensor

from text2weight.artifact import created_by
from text2weight.descriptions import Descriptions, describe_classes, match_descriptions
from text2weight.enhancement import EnhanceMethod, start_timestep
from text2weight.generator import GenerationRequest
from text2weight.text_encoder import Vocabulary
from text2weight_service.model import Model


@dataclass(frozen=True)
class Job:
    """One request for a head, its input already normalised.

    Attributes:
        request_id: for log lines.
        classes: normalised class names.
        seed: of the reverse diffusion.
        steps: denoiser calls; None takes the checkpoint's.
        sampler: likewise.
        deadline: `time.monotonic()` at which the caller gives up.
        template: of the classes' prompts; None takes the checkpoint's.
        guidance_scale: of classifier-free guidance.
        descriptions: of every class, which the denoiser reads in place of the prompts, or None.
        describe_classifier: make the class embeddings from the descriptions, too.
        emphasis: a factor of each class's share in the pooled condition, or None.
        given: (P,) the head to enhance, or None.
        strength: how far to go from the given head.
        method: how the given head is enhanced; None for what suits it.
        reusable: whether the head is worth keeping: the caller gave the seed and may ask for the same again.
    """

    request_id: str
    classes: tuple[str, ...]
    seed: int
    steps: int | None
    sampler: str | None
    deadline: float
    template: str | None = None
    guidance_scale: float = 1.0
    descriptions: Descriptions | None = None
    describe_classifier: bool = False
    emphasis: Tensor | None = None
    given: Tensor | None = None
    strength: float = 1.0
    method: EnhanceMethod | None = None
    reusable: bool = True


@dataclass(frozen=True)
class Work:
    """A job that the model has accepted.

    Attributes:
        job: what was asked for.
        prompts: one for each class.
        texts: every text that has to be embedded, each once: prompts and descriptions.
        request: what is computed, with embeddings that are yet to be filled in.
        calls: most denoiser calls that it takes.
        key: hash of all that the head follows from.
    """

    job: Job
    prompts: tuple[str, ...]
    texts: tuple[str, ...]
    request: GenerationRequest
    calls: int
    key: str

    def fill_in(self, rows: Mapping[str, Tensor]) -> GenerationRequest:
        """The request with its embeddings, from rows (D,) of all its texts."""
        embeddings = torch.stack([rows[prompt] for prompt in self.prompts])  # (K, D)
        request = replace(self.request, embeddings=embeddings)
        if self.job.descriptions is None:
            return request
        encoder = _KnownTexts(rows, embeddings.shape[1])
        text = describe_classes(self.job.descriptions, self.job.classes, encoder, self.job.describe_classifier)
        return replace(request, condition_text=text, embeddings=text.embeddings if text.in_classifier else embeddings)


def plan_work(model: Model, job: Job) -> Work:
    """Find out what a job needs.

    Raises:
        InvalidInputError: the model refuses it; `field` says which part.
    """
    prompts = tuple(model.prompts(job.classes, job.template))
    sampler, steps = model.resolve_sampling(job.sampler, job.steps)
    request = GenerationRequest(
        job.classes,
        _unknown(len(prompts), model.text_encoder.embedding_dim),  # (K, D)
        job.seed,
        steps,
        sampler,
        guidance_scale=job.guidance_scale,
        given=job.given,
        strength=job.strength,
        method=job.method,
        emphasis=job.emphasis,
        template=job.template,
    )
    model.check(request)
    described = () if job.descriptions is None else match_descriptions(job.descriptions, job.classes)
    texts = dict.fromkeys([*prompts, *(text for own in described for text in own)])
    calls = min(steps, start_timestep(model.config.schedule, job.strength, job.method))
    return Work(job, prompts, tuple(texts), request, calls, _hash(model, job, prompts, request))


@lru_cache
def _unknown(classes: int, dim: int) -> Tensor:
    """In place of embeddings (K, D) that are not there yet: only its shape is read."""
    return torch.empty(()).expand(classes, dim)


def _hash(model: Model, job: Job, prompts: Sequence[str], request: GenerationRequest) -> str:
    """Everything that a head's bytes follow from, as 64 hexadecimal digits."""
    parts = [
        created_by(),
        model.checkpoint_hash,
        model.text_encoder.fingerprint,
        job.classes,
        prompts,
        job.seed,
        request.steps,
        request.sampler,
        job.guidance_scale,
        None if job.descriptions is None else sorted(job.descriptions.items()),
        job.describe_classifier,
        None if job.emphasis is None else job.emphasis.tolist(),
        None if job.given is None else hashlib.sha256(job.given.numpy().tobytes()).hexdigest(),
        None if job.given is None else (job.strength, job.method),
    ]
    return hash_of(parts)


def hash_of(parts: Sequence[object]) -> str:
    """64 hexadecimal digits that differ where any part does."""
    # JSON says where a part ends: no two different lists give the same text.
    return hashlib.sha256(to_json(parts)).hexdigest()


class _KnownTexts:
    """A text encoder of texts whose rows (D,) are there already."""

    name = "cache"
    fingerprint = ""
    vocabulary: Vocabulary | None = None

    def __init__(self, rows: Mapping[str, Tensor], embedding_dim: int) -> None:
        self._rows = rows
        self.embedding_dim = embedding_dim

    def encode(self, texts: Sequence[str]) -> Tensor:
        return torch.stack([self._rows[text] for text in texts])  # (n, D)
