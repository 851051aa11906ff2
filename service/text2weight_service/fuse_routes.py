"""POST /fuse: one head for several tasks, generated from the text of all of them or merged from a head of each.

Letters: K classes of the union, o output size, n heads, P numbers in one head.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from fastapi import APIRouter, Request
from fastapi.responses import Response
from torch import Tensor

from text2weight.artifact import FORMAT, HeadArtifact, created_by
from text2weight.condition import MIN_CLASSES, emphasis_of_tasks, normalise_tasks, plain_name, union_of_tasks
from text2weight.errors import InvalidInputError
from text2weight.merging import average, git_rebasin, task_arithmetic, ties
from text2weight_service.engine import Engine
from text2weight_service.exchange import (
    DirectRoute,
    answer_deadline,
    body_docs,
    head_docs,
    parse_json,
    read_json,
    ready_engine,
)
from text2weight_service.heads import (
    HeadResponse,
    answer_with_heads,
    cache_headers,
    client_has,
    entity_tag,
    head_headers,
    new_job,
    text_warnings,
)
from text2weight_service.model import Model
from text2weight_service.multipart import is_multipart, read_parts
from text2weight_service.schemas import MAX_TASKS, FuseRequest
from text2weight_service.tracing import server_timing
from text2weight_service.uploads import HEAD_DOCS, Uploads, read_upload, upload_rules, uploads_of

router = APIRouter(route_class=DirectRoute)

# Between what was best for two heads trained on a task each (0.1 of the deviations' sum, by TIES 0.15) and for two that
# were generated (0.3), by docs/suites.md: 0.2 of the sum is 0.4 of the mean, which is the same for any number of heads.
_MEAN_SCALE = 0.4
_TIES_SCALE = 0.2
_TIES_DENSITY = 0.2
# Only read where the head is generated.
_TEXT_FIELDS = ("seed", "steps", "sampler", "guidance_scale", "prompt_template")
# Two heads' embeddings of one class, in fp16 and in fp32, differ by less.
_SAME_EMBEDDING = 0.01


@router.post(
    "/fuse",
    summary="Make one head for the classes of several tasks",
    response_class=HeadResponse,
    responses=head_docs("Head artifact for the union of the tasks' classes; the metadata states method and tasks"),
    openapi_extra=body_docs(
        FuseRequest,
        {
            "request": {"$ref": "#/components/schemas/FuseRequest"},
            "head": {"type": "array", "items": HEAD_DOCS, "minItems": 2, "maxItems": MAX_TASKS},
        },
    ),
)
async def fuse(request: Request) -> Response:
    """Make one head for the classes of several tasks, each class once, in order of first appearance.

    The method `text` generates it; the classical methods merge the heads that are uploaded, one per task.
    """
    engine, uploads = ready_engine(request), uploads_of(request)
    if not is_multipart(request):
        body = await read_json(request, FuseRequest)
        return await _answer(request, engine, uploads, body, [])
    rules = upload_rules(engine.model, engine.settings.max_body_bytes, heads=MAX_TASKS, least=0)
    with uploads.place(request):
        parts = await read_parts(request, rules)
        body = parse_json(parts["request"][0].data, FuseRequest)
        return await _answer(request, engine, uploads, body, [part.data for part in parts["head"]])


async def _answer(
    request: Request, engine: Engine, uploads: Uploads, body: FuseRequest, files: Sequence[bytes]
) -> Response:
    model, deadline = engine.model, answer_deadline(request, engine, body.deadline_ms)
    started = time.perf_counter()
    heads = await uploads.run(partial(_read_heads, model, files), deadline) if files else []
    read = time.perf_counter()
    tasks = normalise_tasks([task.classes for task in body.tasks])
    classes = _unite(tasks, engine.settings.max_classes)
    _check_heads(body, tasks, heads)
    notes = {"method": body.method, "tasks": _describe_tasks(body, tasks)}
    if body.method != "text":
        if warnings := _warnings_of_merged(model, classes, heads):
            notes["warnings"] = json.dumps(warnings, ensure_ascii=False)
        data = await uploads.run(partial(_merged_head, model, body, classes, heads, notes), deadline)
        stages = {"read": read - started, "merge": time.perf_counter() - read}
        return _answer_merged(request, data, len(warnings), stages)
    weights = [task.weight for task in body.tasks]
    emphasis = None
    if any(weight is not None for weight in weights):
        emphasis = emphasis_of_tasks(tasks, [1.0 if weight is None else weight for weight in weights])  # (K,)
    job = new_job(request, engine, body, classes, template=body.prompt_template, emphasis=emphasis)
    return await answer_with_heads(request, engine, [job], body.precision, notes)


def _read_heads(model: Model, files: Sequence[bytes]) -> list[HeadArtifact]:
    return [read_upload(model, data, f"head[{i}]") for i, data in enumerate(files)]


def _unite(tasks: Sequence[Sequence[str]], maximum: int) -> tuple[str, ...]:
    classes = union_of_tasks(tasks)
    if not MIN_CLASSES <= len(classes) <= maximum:
        raise InvalidInputError(
            "tasks", f"the tasks have {len(classes)} different classes: allowed are {MIN_CLASSES} to {maximum}"
        )
    return classes


def _check_heads(body: FuseRequest, tasks: Sequence[Sequence[str]], heads: Sequence[HeadArtifact]) -> None:
    if heads and len(heads) != len(tasks):
        raise InvalidInputError("head", f"{len(heads)} heads for {len(tasks)} tasks: send one per task, in their order")
    if body.method != "text":
        if not heads:
            raise InvalidInputError(
                "head", f"method {body.method!r} merges heads: send multipart/form-data with one part 'head' per task"
            )
        for name in _TEXT_FIELDS:
            if getattr(body, name) is not None:
                raise InvalidInputError(name, f"method {body.method!r} generates nothing: leave {name} out")
        for i, task in enumerate(body.tasks):
            if task.weight is not None:
                raise InvalidInputError(
                    f"tasks[{i}].weight", f"method {body.method!r} knows no weights: leave them out, or use 'text'"
                )
    for i, (classes, head) in enumerate(zip(tasks, heads, strict=False)):
        there = set(_rows(head))
        missing = [name for name in classes if name.casefold() not in there]
        if missing:
            raise InvalidInputError(f"head[{i}]", f"the head has no class {missing[0]!r} of tasks[{i}]")


def _rows(head: HeadArtifact) -> dict[str, Tensor]:
    """A head's class embeddings (o,) by plain name without case."""
    return {plain_name(name).casefold(): row for name, row in zip(head.classes, head.class_embeddings, strict=True)}


def _describe_tasks(body: FuseRequest, tasks: Sequence[Sequence[str]]) -> str:
    described = [
        {"classes": list(classes)} | ({} if task.weight is None else {"weight": task.weight})
        for task, classes in zip(body.tasks, tasks, strict=True)
    ]
    return json.dumps(described, ensure_ascii=False)


def _warnings_of_merged(model: Model, classes: Sequence[str], heads: Sequence[HeadArtifact]) -> list[str]:
    """As of a head that is generated, by what the uploaded heads state about their class embeddings."""
    described = ["class_text" in head.metadata for head in heads]
    return text_warnings(model, classes, heads[0].metadata.get("template"), any(described), all(described))


def _merged_head(
    model: Model, body: FuseRequest, classes: Sequence[str], heads: Sequence[HeadArtifact], notes: dict[str, str]
) -> bytes:
    """Merge uploaded heads; takes the model's anchor, and none of its time."""
    spec, config = model.config.head, model.config
    embeddings = _union_embeddings(classes, heads)  # (K, o)
    weights = merge(model, body.method, torch.stack([spec.flatten(head.tensors) for head in heads]))  # (P,)
    if not bool(torch.isfinite(weights).all()):
        raise InvalidInputError("head", "the heads' weights are too large to be merged: give trained heads")
    tensors = {name: tensor.clone() for name, tensor in spec.unflatten(weights).items()}
    # What the class embeddings were made from is the heads' own.
    given = heads[0].metadata
    metadata = {
        **{key: given[key] for key in ("template", "class_text") if key in given},
        "format": FORMAT,
        "classes": json.dumps(classes, ensure_ascii=False),
        "logit_scale": repr(config.logit_scale),
        "activation": spec.activation,
        "checkpoint": model.checkpoint_hash,
        "text_encoder": model.text_encoder.name,
        "backbone": str(config.backbone.get("name", "unknown")),
        "created_by": created_by(),
        **notes,
    }
    return HeadArtifact(tensors, embeddings, metadata).to_bytes(body.precision)


def _answer_merged(request: Request, data: bytes, warnings: int, stages: Mapping[str, float]) -> Response:
    tag = entity_tag(data.hex())
    if client_has(request, tag):
        return Response(status_code=304, headers=cache_headers(tag))
    headers = head_headers("head-fused", tag, warnings) | server_timing(request.app, stages)
    return HeadResponse(data, headers=headers)


def merge(model: Model, method: str, heads: Tensor) -> Tensor:
    """Merge heads (n, P) of a checkpoint's backbone by a classical method: (P,).

    Args:
        model: its anchor is what task arithmetic and TIES measure deviations from.
        method: one of `schemas.FuseMethod` but text.
        heads: one per task.
    """
    if method == "average":
        return average(heads)
    if method == "git-rebasin":
        return git_rebasin(model.config.head, heads)
    if method == "task-arithmetic":
        return task_arithmetic(model.anchor, heads, _MEAN_SCALE / len(heads))
    return ties(model.anchor, heads, _TIES_DENSITY, _TIES_SCALE)


def _union_embeddings(classes: Sequence[str], heads: Sequence[HeadArtifact]) -> Tensor:
    """Class embeddings (K, o) of the union, each from the first head that has the class."""
    found: list[Tensor] = []
    there = [_rows(head) for head in heads]
    for name in classes:
        own = [(i, rows[name.casefold()]) for i, rows in enumerate(there) if name.casefold() in rows]
        (first_head, first), *others = own
        for i, row in others:
            if not torch.allclose(first, row, atol=_SAME_EMBEDDING):
                raise InvalidInputError(
                    f"head[{i}]",
                    f"its class embedding of {name!r} is not that of head[{first_head}]: use one text encoder",
                )
        if abs(float(first.norm()) - 1) > _SAME_EMBEDDING:
            raise InvalidInputError(f"head[{first_head}]", f"its class embedding of {name!r} has not length 1")
        found.append(first)
    return torch.stack(found)  # (K, o)
