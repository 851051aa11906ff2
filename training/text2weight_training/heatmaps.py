"""Grad-CAM (arXiv 1610.02391) of a backbone and a generated head: where in a picture a class is seen.

A backbone whose features are the spatial mean of its last feature map, as every ResNet's, is run once; everything
behind that map, the mean, the head and the class embeddings, is a small network of which the grad-cam library makes
the heat maps for as many heads as there are.

Letters: N pictures, R their side in pixels, d features, a x b the last feature map, K classes, P numbers in one head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from text2weight.head import HeadSpec, apply_heads, class_logits
from text2weight_training.files import TrainingDataError
from text2weight_training.image_encoders import ImageEncoder

# Rounding between a map's mean as the network takes it and as we do, relative to the features' size.
TOLERANCE = 1e-3


class Tail(nn.Module):
    """What comes after the last feature map: its mean, a head, and the cosine with the class embeddings."""

    def __init__(self, spec: HeadSpec, head: Tensor, embeddings: Tensor, logit_scale: float) -> None:
        """Build it for one task.

        Args:
            spec: the head's specification.
            head: (P,) weights.
            embeddings: (K, D) of the task's classes.
            logit_scale: s of the cosine logits.
        """
        super().__init__()
        self.spec, self.logit_scale = spec, logit_scale
        self.maps = nn.Identity()  # the layer whose activations and gradients Grad-CAM reads
        self.head = nn.Parameter(head.clone(), requires_grad=False)
        self.embeddings = nn.Parameter(embeddings.clone(), requires_grad=False)

    def forward(self, maps: Tensor) -> Tensor:
        """Feature maps (N, d, a, b) to logits (N, K)."""
        features = self.maps(maps).mean(dim=(2, 3))  # (N, d)
        outputs = apply_heads(self.spec, self.head[None], features)  # (1, N, o)
        return class_logits(outputs, self.embeddings, self.logit_scale)[0]  # (N, K)


def last_feature_maps(encoder: ImageEncoder, pixels: Tensor) -> Tensor:
    """Run a backbone up to its last feature map.

    Args:
        encoder: the backbone.
        pixels: (N, 3, R, R) uint8.

    Returns:
        (N, d, a, b) fp32 on the CPU.

    Raises:
        TrainingDataError: the features are not the spatial mean of a map, so a part of the network is behind it.
    """
    seen: list[Tensor] = []

    def keep_last(_: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and output.shape[-1] > 1:
            seen[:] = [output]

    hooks = [module.register_forward_hook(keep_last) for module in encoder.model.modules()]
    try:
        with torch.no_grad():
            features = encoder.model(encoder.normalise(pixels)).float().cpu()  # (N, d)
    finally:
        for hook in hooks:
            hook.remove()
    maps = seen[0].float().cpu() if seen else torch.empty(0, 0, 1, 1)  # (N, d, a, b)
    mean = maps.mean(dim=(2, 3))  # (N, d)
    if mean.shape != features.shape or float((mean - features).norm()) > TOLERANCE * float(features.norm()):
        raise TrainingDataError(
            f"the features of {encoder.description} at {encoder.side} px are not the mean of its last feature map, "
            "which Grad-CAM is made of here: use a convolutional backbone such as a ResNet, with larger pictures "
            "where the map has shrunk to one point"
        )
    return maps


def grad_cam(tail: Tail, maps: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Heat maps of given classes.

    Args:
        tail: one head of one task.
        maps: (N, d, a, b) of N pictures.
        targets: (N,) positions of the classes within the task.

    Returns:
        heat (N, a, b), each stretched to 0..1, or 0 throughout where no part of the picture speaks for the class; and
        the classes' probabilities (N,).
    """
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    cam = GradCAM(model=tail, target_layers=[tail.maps])
    try:
        # No parameter before the maps learns, so the maps themselves have to ask for their gradient.
        asking = maps.clone().requires_grad_(True)  # (N, d, a, b)
        heat = cam(input_tensor=asking, targets=[ClassifierOutputTarget(int(target)) for target in targets])
        logits: Tensor = cam.outputs.detach()  # (N, K)
    finally:
        cam.activations_and_grads.release()
    probabilities = logits.softmax(-1).gather(1, targets[:, None]).squeeze(1)  # (N,)
    return torch.from_numpy(heat).float(), probabilities


def correlation(one: Tensor, other: Tensor) -> Tensor:
    """Pearson's correlation of heat maps (N, a, b), picture by picture: (N,).

    A map without any contrast agrees with nothing: 0.
    """
    flat = [maps.flatten(1) - maps.flatten(1).mean(1, keepdim=True) for maps in (one, other)]  # (N, ab) each
    lengths = flat[0].norm(dim=1) * flat[1].norm(dim=1)  # (N,)
    products = (flat[0] * flat[1]).sum(1)  # (N,)
    return torch.where(lengths > 0, products / lengths.clamp(min=1e-12), 0.0)
