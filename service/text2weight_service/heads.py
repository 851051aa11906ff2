"""From the fields of a request to the engine's jobs, and from finished heads to the answer."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from text2weight.artifact import Precision, read_head, stack_to_bytes
from text2weight.condition import normalise_class_names
from text2weight.errors import InvalidInputError
from text2weight.generator import MAX_SEED
from text2weight.text_encoder import TableTextEncoder
from text2weight_service.engine import Engine
from text2weight_service.exchange import HEAD_TYPE, answer_deadline, while_connected
from text2weight_service.job import Job, hash_of, plan_work
from text2weight_service.model import Model
from text2weight_service.schemas import MAX_SAMPLES, GenerateFields, SamplingFields
from text2weight_service.tracing import server_timing
from text2weight_service.work_queue import Generated

MAX_DESCRIPTIONS = 16  # of one class: each is a text to embed
# Small enough for every JSON reader: JavaScript numbers are exact up to here.
_DRAWN_SEEDS = 2**53 - MAX_SAMPLES
_ENTITY_TAG = re.compile(r'"[\x21\x23-\x7e\x80-\xff]*"')


class HeadResponse(Response):
    """A head artifact."""

    media_type = HEAD_TYPE


def new_job(request: Request, engine: Engine, body: SamplingFields, classes: Sequence[str], **fields: Any) -> Job:
    """A job of the fields that all requests for a head share.

    Args:
        request: its id and the time it came.
        engine: its settings are the limits.
        body: what the client asks for.
        classes: class names as the client wrote them.
        fields: further fields of the job.

    Raises:
        InvalidInputError: field "classes", "steps" or "deadline_ms".
    """
    if body.steps is not None and body.steps > engine.settings.max_steps:
        raise InvalidInputError("steps", f"steps is {body.steps}: allowed are 1 to {engine.settings.max_steps}")
    return Job(
        request_id=request.state.request_id,
        classes=normalise_class_names(classes, maximum=engine.settings.max_classes),
        seed=secrets.randbelow(_DRAWN_SEEDS) if body.seed is None else body.seed,
        steps=body.steps,
        sampler=body.sampler,
        deadline=answer_deadline(request, engine, body.deadline_ms),
        guidance_scale=1.0 if body.guidance_scale is None else body.guidance_scale,
        reusable=body.seed is not None,
        **fields,
    )


def generation_job(request: Request, engine: Engine, body: GenerateFields) -> Job:
    """The job of a request to generate a head.

    Raises:
        InvalidInputError: see `new_job`; field "descriptions".
    """
    if body.descriptions is not None:
        _check_descriptions(engine.model, body.descriptions)
    elif body.describe_classifier:
        raise InvalidInputError("descriptions", "describe_classifier needs descriptions: give one for each class")
    return new_job(
        request,
        engine,
        body,
        body.classes,
        template=body.prompt_template,
        descriptions=body.descriptions,
        describe_classifier=body.describe_classifier,
    )


def check_seeds(first: int, samples: int) -> None:
    """Refuse more samples than there are seeds.

    Raises:
        InvalidInputError: field "seed".
    """
    if first + samples - 1 > MAX_SEED:
        raise InvalidInputError(
            "seed", f"seed is {first}: allowed are 0 to {MAX_SEED - samples + 1} for {samples} samples"
        )


async def answer_with_heads(
    request: Request, engine: Engine, jobs: Sequence[Job], precision: Precision, notes: Mapping[str, str] | None = None
) -> Response:
    """Compute jobs that differ in their seeds and answer with their heads; one head comes as it is, several stacked.

    Args:
        request: the client's.
        engine: computes.
        jobs: at least one.
        precision: of the answer.
        notes: further metadata.

    Returns:
        the heads, or status 304 where the client holds them already.

    Raises:
        InvalidInputError: the model refuses the input, or the numbers do not fit the precision.
    """
    metadata = dict(notes or {})
    if warnings := warnings_of(engine.model, jobs[0]):
        metadata["warnings"] = json.dumps(warnings, ensure_ascii=False)
    reusable = jobs[0].reusable
    if reusable and "if-none-match" in request.headers:
        asked = entity_tag(plan_work(engine.model, jobs[0]).key, len(jobs), precision, metadata)
        if client_has(request, asked):
            return Response(status_code=304, headers=cache_headers(asked))
    results = await while_connected(request, [engine.generate(job) for job in jobs])
    tag = entity_tag(results[0].key, len(jobs), precision, metadata) if reusable else None
    return HeadResponse(
        render([result.data for result in results], precision, metadata),
        headers={
            **head_headers(f"head-{jobs[0].seed}", tag, len(warnings)),
            **server_timing(request.app, _longest_stages(results)),
        },
    )


def render(heads: Sequence[bytes], precision: Precision, metadata: Mapping[str, str]) -> bytes:
    """Bring the engine's heads into the form of the answer.

    Raises:
        InvalidInputError: field "precision"; a number is too large for it.
    """
    if len(heads) == 1 and precision == "fp32" and not metadata:
        return heads[0]
    artifacts = [read_head(data).with_metadata(**metadata) for data in heads]
    return artifacts[0].to_bytes(precision) if len(heads) == 1 else stack_to_bytes(artifacts, precision)


def warnings_of(model: Model, job: Job) -> list[str]:
    """What of a job's text the text encoder was not trained on; see `text_warnings`."""
    return text_warnings(model, job.classes, job.template, job.descriptions is not None, job.describe_classifier)


def text_warnings(
    model: Model, classes: Sequence[str], template: str | None, described: bool, describe_classifier: bool
) -> list[str]:
    """What of a head's text lies outside of what the text encoder was trained on; empty for an encoder of any text.

    Args:
        model: its text encoder is asked.
        classes: normalised class names.
        template: of their prompts; None for the checkpoint's.
        described: whether descriptions were read.
        describe_classifier: whether the class embeddings were made from them, and not from the names.
    """
    encoder = model.text_encoder
    vocabulary = encoder.vocabulary
    if vocabulary is None:
        return []
    by_name = not (described and describe_classifier)
    warnings = [
        f"class {name!r} is not among the {len(vocabulary.names)} names that text encoder {encoder.name} knows"
        for name in (classes if by_name else ())
        if name not in vocabulary
    ]
    if by_name and template is not None and template not in vocabulary.templates:
        known = ", ".join(map(repr, vocabulary.templates))
        warnings.append(f"prompt_template {template!r} is not among those that {encoder.name} knows: {known}")
    if described:
        warnings.append(f"text encoder {encoder.name} knows names and no descriptions")
    return warnings


def entity_tag(*parts: object) -> str:
    """A strong entity tag of all that an answer follows from."""
    return f'"{hash_of(parts)}"'


def client_has(request: Request, tag: str) -> bool:
    """Whether If-None-Match names an answer."""
    return any(tag in _ENTITY_TAG.findall(value) for value in request.headers.getlist("if-none-match"))


def head_headers(name: str, tag: str | None, warnings: int) -> dict[str, str]:
    """Headers of an answer that is one safetensors file."""
    headers = {"Content-Disposition": f'attachment; filename="{name}.safetensors"', **cache_headers(tag)}
    return headers | ({"X-T2W-Warnings": str(warnings)} if warnings else {})


def cache_headers(tag: str | None) -> dict[str, str]:
    """Headers that say whether an answer may be kept: only where it can be asked for again, and only by this client."""
    if tag is None:
        return {"Cache-Control": "no-store"}
    return {"ETag": tag, "Cache-Control": "private, no-cache", "Vary": "Authorization"}


def _check_descriptions(model: Model, descriptions: Mapping[str, Any]) -> None:
    if isinstance(model.text_encoder, TableTextEncoder):
        raise InvalidInputError(
            "descriptions", f"text encoder {model.text_encoder.name} is a table of names: it cannot embed descriptions"
        )
    for name, texts in descriptions.items():
        if isinstance(texts, list) and len(texts) > MAX_DESCRIPTIONS:
            raise InvalidInputError(
                "descriptions", f"{name[:80]!r} has {len(texts)} descriptions: at most {MAX_DESCRIPTIONS} are allowed"
            )


def _longest_stages(results: Sequence[Generated]) -> dict[str, float]:
    """Seconds in each stage; of several results the longest."""
    return {
        "queue": max(result.queue_s for result in results),
        "encode": max(result.encode_s for result in results),
        "sample": max(result.sample_s for result in results),
    }
