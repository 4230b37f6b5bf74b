"""A DynaMo model on disk: one folder with configuration, weights and co-occurrence tables.

`full` folders hold everything, `heads` folders only what the heads add, beside their base's name, place and fingerprint.
Weights are safetensors with their checksums beside them; pickles are never read. Every file is written under a
temporary name and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import cached_file

from dynamo_lm.backbone.base_model import fingerprint, keep_fingerprint
from dynamo_lm.backbone.offloading import device_of
from dynamo_lm.cooccurrence.table import Cooccurrence
from dynamo_lm.errors import InputError, first_line
from dynamo_lm.files import atomic_files, is_disk_full
from dynamo_lm.model.base_check import check_contract
from dynamo_lm.model.base_location import describe_base, open_base
from dynamo_lm.model.configuration import DynaMoConfig
from dynamo_lm.model.model_card import model_card
from dynamo_lm.model.quantization import check_quantization, lay_out, quantize
from dynamo_lm.model.resizing import check_vocabulary

TABLE_FILE = "cooccurrence.safetensors"
HEADS_FILE = "heads.safetensors"
ROUNDED_FILE = "model.safetensors"  # of a full folder whose weights are rounded
COUPLING = "coupling."  # names in HEADS_FILE that are not below `heads.`
CHECKSUMS_FILE = "checksums.json"  # {weight file: CRC-32}; the tables carry one of their own


def save(model: Any, folder: str | os.PathLike, weights: str = "full", **kwargs: Any) -> None:
    """Writes `model` into `folder`: config.json, weights, generation_config.json, tables if the model has any.

    Args:
        folder: created if missing; files of the same names are replaced, each in one rename.
        weights: "full" (base and heads) or "heads" (the base is named and fingerprinted instead).
        **kwargs: handed to transformers' `save_pretrained` (push_to_hub, repo_id, max_shard_size, ...).

    Raises:
        InputError: the base was trained or resized too but only heads are to be saved, the heads have a vocabulary of
            another size than the base, or the disk is full.
    """
    if weights not in ("full", "heads"):
        raise InputError(f'weights is "{weights}"; give "full" or "heads".')
    check_vocabulary(model)
    rounded = model.config.quantization is not None
    now = model.config.base_fingerprint if rounded else fingerprint(model.base)
    if weights == "heads":
        if model.config.base_fingerprint not in (None, now):
            raise InputError(
                "The base was changed by training, by resizing its vocabulary or by a cast to float16, so heads alone would "
                'not fit it; save with weights="full".'
            )
        if not model.config.base_name_or_path:
            raise InputError('The base has no name or path to be found again by; save with weights="full".')
    push = kwargs.pop("push_to_hub", False)
    target = Path(folder)
    try:
        with atomic_files(target) as temporary:
            described = {"weights": weights, "base_fingerprint": now} | describe_base(model.config, target)
            if weights == "full":
                described["base_path"] = None  # of no use without heads that look for it
            before = {key: getattr(model.config, key) for key in described}
            vars(model.config).update(described)
            try:
                if weights == "full" and not rounded:
                    PreTrainedModel.save_pretrained(model, temporary, **kwargs)
                else:
                    model.config.save_pretrained(temporary)
                    model.generation_config.save_pretrained(temporary)
                    heads = weights == "heads"
                    tensors = head_weights(model) if heads else stored_tensors(model)
                    save_file(tensors, temporary / (HEADS_FILE if heads else ROUNDED_FILE), metadata={"format": "pt"})
                (temporary / "README.md").write_text(model_card(model), encoding="utf-8")
            finally:
                vars(model.config).update(before)
            if model.cooccurrence is not None:
                model.cooccurrence.save(temporary / TABLE_FILE)
            files = sorted(set(temporary.glob("*.safetensors")) - {temporary / TABLE_FILE})
            checksums = {file.name: _checksum(file) for file in files}
            (temporary / CHECKSUMS_FILE).write_text(json.dumps(checksums, indent=2) + "\n", encoding="utf-8")
            names = {file.name for file in temporary.iterdir()}
        for old in [*target.glob("model*.safetensors*"), target / HEADS_FILE]:  # of an earlier save in another form
            if old.name not in names:
                old.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        if is_disk_full(error):
            raise InputError(f'The disk of "{target}" is full; free some space and save again.') from error
        if isinstance(error, SafetensorError):
            raise InputError(f'Weights could not be written to "{target}" ({error}).') from error
        raise
    if push:
        from huggingface_hub import HfApi

        repo = kwargs.get("repo_id") or target.name
        api = HfApi(token=kwargs.get("token"))
        repo = api.create_repo(repo, exist_ok=True, private=kwargs.get("private")).repo_id
        api.upload_folder(repo_id=repo, folder_path=target)


def head_weights(model: Any) -> dict[str, torch.Tensor]:
    """The tensors that the heads own, by their name below `heads.`, and `coupling.*` if they are coupled; what they share
    with the base is left out."""
    shared = {tensor.data_ptr() for tensor in (*model.base.parameters(), *model.base.buffers())}
    named = model.heads.state_dict()
    if model.coupling is not None:
        named |= model.coupling.state_dict(prefix=COUPLING)
    return {
        name: tensor.detach().contiguous()
        for name, tensor in named.items()
        if tensor.data_ptr() not in shared or tensor.numel() == 0
    }


def stored_tensors(model: Any) -> dict[str, torch.Tensor]:
    """All tensors of a model, each under the first of its names."""
    named: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict().items():
        named.setdefault(tensor.data_ptr(), (name, tensor.detach().contiguous()))
    return dict(named.values())


def identity(model: Any) -> str:
    """A hash of base, heads and whether there are tables: 16 hexadecimal digits, the same in float32 and bfloat16."""
    digest = hashlib.sha256(fingerprint(model.base).encode())
    for name, tensor in sorted(model.heads.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().to("cpu", torch.bfloat16).flatten().view(torch.uint8).numpy().tobytes())
    digest.update(str(model.cooccurrence.order if model.cooccurrence is not None else 0).encode())
    return digest.hexdigest()[:16]


def load(cls: type[PreTrainedModel], name: str, *args: Any, **kwargs: Any) -> Any:
    """Opens what `save` wrote; see `DynaMoForCausalLM.from_pretrained`."""
    base, allow_mismatch = kwargs.pop("base", None), kwargs.pop("allow_base_mismatch", False)
    quantization = kwargs.pop("weights", None)
    check_quantization(quantization)
    config = kwargs.pop("config", None)
    name = str(name)
    if not isinstance(config, DynaMoConfig):
        config = read_config(name)
    if config.quantization is not None and quantization not in (None, config.quantization):
        raise InputError(f'"{name}" holds {config.quantization} weights, not {quantization}; open it without that choice.')
    kwargs["use_safetensors"] = True
    _verify(name)
    if base is not None and config.weights == "full":
        raise InputError(f'"{name}" holds its own base; --base goes with folders that hold heads alone, so leave it out.')
    try:
        if config.weights == "full" and config.quantization is not None:
            model = _load_rounded(cls, name, config, kwargs.get("dtype", "auto"))
        elif config.weights == "full":
            model = _load_full(cls, name, config, *args, **kwargs)
        else:
            kwargs.pop("use_safetensors")
            model = _load_heads(cls, name, config, open_base(name, config, base, allow_mismatch=allow_mismatch, **kwargs))
    except (SafetensorError, OSError) as error:
        raise InputError(f'The weights in "{name}" are missing, truncated or altered: {first_line(error)}') from error
    model.stack_heads = check_contract(model.base, cls)  # type: ignore[arg-type]  # every class that is opened so is a MultiHeadLM
    if quantization is not None and config.quantization is None:
        quantize(model, quantization)
    table = _find(name, TABLE_FILE)
    if table is not None:
        model.cooccurrence = Cooccurrence.load(table)
        if model.cooccurrence.vocab_size > config.vocab_size:
            raise InputError(
                f'The tables in "{name}" were counted with a vocabulary of {model.cooccurrence.vocab_size}, '
                f"the model has {config.vocab_size}; count again with this model's tokenizer."
            )
    return model


def read_config(name: str) -> DynaMoConfig:
    """The configuration of a DynaMo folder.

    Raises:
        InputError: not a folder or repository with a DynaMo model.
    """
    path = _find(name, "config.json")
    if path is None:
        raise InputError(f'"{name}" is not a model folder: it has no config.json.')
    try:
        content = json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise InputError(f'"{name}/config.json" is not valid JSON: {error}') from error
    if not isinstance(content, dict):
        raise InputError(f'"{name}/config.json" is not a configuration; it should hold a JSON object.')
    if content.get("model_type") != DynaMoConfig.model_type:
        raise InputError(
            f'"{name}" holds a model of type "{content.get("model_type")}" without heads; add some with `dynamo-lm train`.'
        )
    return DynaMoConfig.from_pretrained(name)


def _checksum(file: Path) -> str:
    value = 0
    with file.open("rb") as stream:
        while piece := stream.read(2**24):
            value = zlib.crc32(piece, value)
    return f"{value:08x}"


def _verify(name: str) -> None:
    """Refuses a local folder whose weight files are not the ones that were saved; downloads are checked by the hub."""
    listed = Path(name) / CHECKSUMS_FILE
    if not listed.is_file():
        return
    try:
        written = dict(json.loads(listed.read_bytes()))
    except (ValueError, TypeError) as error:
        raise InputError(f'"{listed}" is not valid JSON: {error}') from error
    for file, checksum in written.items():
        path = Path(name) / file
        if not path.is_file():
            raise InputError(f'"{name}" has no {file}, where its weights should be; copy the folder again.')
        if _checksum(path) != checksum:
            raise InputError(f'"{path}" is truncated or altered since it was saved; copy the folder again.')


def _load_full(cls: type[PreTrainedModel], name: str, config: DynaMoConfig, *args: Any, **kwargs: Any) -> Any:
    # transformers would start from random numbers where weights are missing; here that is an error.
    kwargs |= {"config": config, "output_loading_info": True, "ignore_mismatched_sizes": True}
    model, report = PreTrainedModel.from_pretrained.__func__(cls, name, *args, **kwargs)  # type: ignore[attr-defined]
    if config.base_fingerprint is not None and model.dtype == torch.float16:
        keep_fingerprint(model.base, config.base_fingerprint)
    unfit = [*sorted(report["missing_keys"]), *sorted(key for key, *_ in report["mismatched_keys"])]
    if unfit:
        raise InputError(f'The weights in "{name}" do not hold {unfit[0]} as its config.json describes it.')
    return model


def _load_rounded(cls: type[PreTrainedModel], name: str, config: DynaMoConfig, dtype: str | torch.dtype) -> Any:
    """A full folder with rounded weights; its other tensors take the dtype."""
    file = _find(name, ROUNDED_FILE)
    if file is None:
        raise InputError(f'"{name}" has no {ROUNDED_FILE}; copy the folder again.')
    model: Any = cls(config)
    lay_out(model)
    tensors, expected = load_file(file), stored_tensors(model)
    if tensors.keys() != expected.keys() or any(tensors[key].shape != expected[key].shape for key in tensors):
        raise InputError(f'"{name}/{ROUNDED_FILE}" does not hold the model that its config.json describes.')
    model.load_state_dict(tensors, strict=False)
    given = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    model.to(config.dtype or torch.float32 if given == "auto" else given)
    if _find(name, "generation_config.json") is not None:
        model.generation_config = GenerationConfig.from_pretrained(name)
    return model.eval()


def _load_heads(cls: type[PreTrainedModel], name: str, config: DynaMoConfig, base: PreTrainedModel) -> Any:
    model: Any = cls(config, base)
    if config.quantization is not None:
        lay_out(model)
    file = _find(name, HEADS_FILE)
    if file is None:
        raise InputError(f'"{name}" has no {HEADS_FILE}; copy the folder again.')
    weights = load_file(file)
    expected = head_weights(model)
    if weights.keys() != expected.keys() or any(weights[key].shape != expected[key].shape for key in weights):
        raise InputError(f'"{name}/{HEADS_FILE}" does not hold the heads that its config.json describes.')
    coupling = {name.removeprefix(COUPLING): weights.pop(name) for name in list(weights) if name.startswith(COUPLING)}
    model.heads.load_state_dict(weights, strict=False)
    model.heads.to(device_of(model.last_layer), base.dtype)
    if model.coupling is not None:
        model.coupling.load_state_dict(coupling)
        model.coupling.to(device_of(base.get_output_embeddings()), base.dtype)
    if _find(name, "generation_config.json") is not None:
        model.generation_config = GenerationConfig.from_pretrained(name)
    return model.eval()


def _find(name: str, file: str) -> str | None:
    if Path(name).is_dir():
        path = Path(name) / file
        return str(path) if path.is_file() else None
    if "/" not in name or name.count("/") > 1 or Path(name).exists():
        return None
    try:
        return cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    except OSError:
        return None
