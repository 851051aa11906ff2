"""Turn a head file into an ONNX model, for ONNX Runtime, TensorRT, a browser or a phone.

    pip install onnx
    t2w generate apple bus lizard -o head.safetensors
    python examples/export_onnx.py head.safetensors head.onnx

Input `features` (N, 512), output `probabilities` (N, K); the class names are in the model's metadata under `classes`.
No torch is needed. Put the backbone's own ONNX model in front of it to go from pictures to classes.
"""

from __future__ import annotations

import sys

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from text2weight_client import GeneratedHead

OPSET = 20  # the first with the exact Gelu


def to_onnx(head: GeneratedHead) -> onnx.ModelProto:
    """The head with its cosine logits and softmax, as a checked model."""
    tensors = dict(head.tensors)
    for layer in ("linear1", "linear2"):  # a head without biases gets zeros
        tensors.setdefault(f"{layer}.bias", np.zeros(len(tensors[f"{layer}.weight"]), np.float32))
    # softmax(s * cos(h, e_i)): the scale is multiplied into the class embeddings once.
    tensors["scaled_embeddings"] = np.float32(head.logit_scale) * head.class_embeddings.T  # (512, K)
    nodes = [
        helper.make_node("Gemm", ["features", "linear1.weight", "linear1.bias"], ["linear1"], transB=1),
        helper.make_node("Gelu" if head.activation == "gelu" else "Identity", ["linear1"], ["hidden"]),
        helper.make_node("Gemm", ["hidden", "linear2.weight", "linear2.bias"], ["outputs"], transB=1),
        helper.make_node("LpNormalization", ["outputs"], ["unit"], axis=1, p=2),
        helper.make_node("MatMul", ["unit", "scaled_embeddings"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "text2weight head",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", head.input_dim])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", len(head.classes)])],
        [numpy_helper.from_array(np.ascontiguousarray(tensor), name) for name, tensor in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    helper.set_model_props(model, head.metadata)
    onnx.checker.check_model(model, full_check=True)
    return model


def main() -> None:
    """Read a head file, write an ONNX file."""
    head_path, onnx_path = sys.argv[1:]
    onnx.save(to_onnx(GeneratedHead.load(head_path)), onnx_path)
    print(f"wrote {onnx_path}")


if __name__ == "__main__":
    main()
