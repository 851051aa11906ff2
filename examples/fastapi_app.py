"""Serve a generated head inside your own FastAPI application.

    pip install fastapi uvicorn
    CLASSES="apple,bus,lizard" uvicorn --app-dir examples fastapi_app:app --port 9000

The application asks a text2weight service (T2W_URL, T2W_API_KEY) for its head once, when it starts, and from then on
classifies by itself in plain NumPy; so it needs neither torch nor, while it runs, the service.

    curl http://127.0.0.1:9000/classify -H 'Content-Type: application/json' -d '{"features": [[0.1, 0.2, ...]]}'
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
from fastapi import FastAPI, HTTPException, Request
from pydantic import BaseModel

from text2weight_client import AsyncClient, GeneratedHead, InvalidFeaturesError


class Features(BaseModel):
    """One row of numbers for each picture, from the backbone that the head was made for."""

    features: list[list[float]]


class Answer(BaseModel):
    """The most probable class of one picture."""

    name: str
    probability: float


@asynccontextmanager
async def with_head(app: FastAPI) -> AsyncIterator[None]:
    """Fetch the head before the first request; a service that still starts is waited for."""
    url, api_key = os.environ.get("T2W_URL", "http://127.0.0.1:8000"), os.environ.get("T2W_API_KEY")
    async with AsyncClient(url, api_key=api_key) as client:
        await client.wait_until_ready()
        app.state.head = await client.generate(os.environ.get("CLASSES", "apple,bus,lizard").split(","), seed=0)
    yield


app = FastAPI(title="Classifier with a generated head", lifespan=with_head)


@app.post("/classify")
def classify(body: Features, request: Request) -> list[Answer]:
    """Name the most probable class of each picture."""
    head: GeneratedHead = request.app.state.head
    try:
        probabilities = head.predict(body.features)  # (N, K)
    except InvalidFeaturesError as error:
        raise HTTPException(422, str(error)) from error
    best = np.argmax(probabilities, axis=1)
    return [Answer(name=head.classes[i], probability=float(row[i])) for i, row in zip(best, probabilities, strict=True)]
