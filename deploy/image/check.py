"""Prove, while the image is built, that what it holds is enough to generate a head. Usage: check.py FLAVOUR."""

import sys

import torch
import torchvision

from text2weight.artifact import HeadArtifact
from text2weight.checkpoint import bundled_checkpoint
from text2weight.generator import Generator
from text2weight_service.server import run_server

head = Generator.load(bundled_checkpoint()).generate(["apple", "bus"], seed=1)
assert isinstance(head, HeadArtifact)
assert torchvision.ops.nms(torch.rand(4, 4), torch.rand(4), 0.5).ndim == 1
assert callable(run_server)
assert sys.argv[1] != "cpu" or not torch.cuda.is_available()
print(f"torch {torch.__version__}: a head of {len(head.to_bytes())} bytes")
