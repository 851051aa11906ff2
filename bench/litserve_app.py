"""The same model behind LitServe, with request-level batching: what `mixed_load` compares with.

A batch is one `Generator.generate_batch`: its members begin together and are answered together.
"""

from __future__ import annotations

import sys

import litserve
import torch
from starlette.responses import Response

from text2weight.artifact import HeadArtifact
from text2weight.generator import GenerationRequest, Generator

MOST_TOGETHER = 32
BATCH_TIMEOUT_S = 0.002


class HeadApi(litserve.LitAPI):
    """Class names in, safetensors out."""

    def __init__(self, checkpoint: str) -> None:
        super().__init__(max_batch_size=MOST_TOGETHER, batch_timeout=BATCH_TIMEOUT_S)
        self._checkpoint = checkpoint

    def setup(self, device: str) -> None:
        self._generator = Generator.load(self._checkpoint)
        self._rows: dict[str, torch.Tensor] = {}

    def decode_request(self, request) -> GenerationRequest:  # type: ignore[no-untyped-def]
        # Without an annotation LitServe hands over the JSON body as it is.
        prompts = self._generator.prompts(request["classes"])
        missing = [prompt for prompt in prompts if prompt not in self._rows]
        if missing:
            self._rows.update(zip(missing, self._generator.text_encoder.encode(missing), strict=True))
        embeddings = torch.stack([self._rows[prompt] for prompt in prompts])  # (K, D)
        classes = tuple(request["classes"])
        return GenerationRequest(classes, embeddings, request["seed"], request["steps"], request["sampler"])

    def batch(self, inputs: list[GenerationRequest]) -> list[GenerationRequest]:
        return inputs

    def predict(self, x: list[GenerationRequest]) -> list[HeadArtifact]:
        return self._generator.generate_batch(x)

    def unbatch(self, output: list[HeadArtifact]) -> list[HeadArtifact]:
        return output

    def encode_response(self, output: HeadArtifact) -> Response:
        return Response(output.to_bytes(), media_type="application/octet-stream")


if __name__ == "__main__":
    server = litserve.LitServer(HeadApi(sys.argv[1]), accelerator="cpu", workers_per_device=1, timeout=False)
    server.run(host="127.0.0.1", port=int(sys.argv[2]), num_api_servers=1, generate_client_file=False)
