"""Comparing head artifacts; not by their bytes, because the order of safetensors' metadata is not fixed."""

from text2weight.artifact import read_head


def same_head(first: bytes, second: bytes) -> bool:
    """Whether two artifacts hold equal metadata and equal numbers, to the last bit."""
    one, other = read_head(first), read_head(second)
    return (
        one.metadata == other.metadata
        and one.class_embeddings.equal(other.class_embeddings)
        and one.tensors.keys() == other.tensors.keys()
        and all(tensor.equal(other.tensors[name]) for name, tensor in one.tensors.items())
    )
