"""Tensors in a GGUF file: their precision, and how the file is finished. Needs the package `gguf` (extra `bench`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PRECISIONS = ("f32", "bf16", "f16", "q8_0")
DRAFT_PRECISION = "q8_0"  # drafts of heads in 8 bits are accepted as often as in 32 (LOG.md)
BY_DTYPE = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def add_tensor(writer: Any, name: str, tensor: Tensor, precision: str) -> None:
    """A matrix in `precision`, a vector in float32; q8_0 takes rows of a multiple of 32, and others become f16."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    if precision == "q8_0" and tensor.shape[-1] % 32:
        precision = "f16"
    if tensor.ndim == 1 or precision == "f32":
        writer.add_tensor(name, tensor.float().numpy())
    elif precision == "f16":
        writer.add_tensor(name, tensor.half().numpy())
    elif precision == "bf16":
        writer.add_tensor(name, tensor.bfloat16().view(torch.uint16).numpy().view("uint8"), raw_dtype=kinds.BF16)
    else:
        writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), kinds.Q8_0), raw_dtype=kinds.Q8_0)


def add_file_type(writer: Any, precision: str) -> None:
    import gguf

    types = gguf.LlamaFileType
    named = {"f32": types.ALL_F32, "bf16": types.MOSTLY_BF16, "f16": types.MOSTLY_F16, "q8_0": types.MOSTLY_Q8_0}
    writer.add_file_type(named[precision])


def interleaved(tensor: Tensor, heads: int) -> Tensor:
    """Rotary pairs are (i, i + size/2) in Hugging Face's files and (2i, 2i + 1) in GGUF's files of the Llama form."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def finish(writer: Any) -> None:
    """Writes what was added, and closes the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
