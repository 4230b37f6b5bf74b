"""`dynamo-lm generate`: text in, continued text out."""

from __future__ import annotations

import json as json_format
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynamo_lm.errors import InputError
from dynamo_lm.files import decode, read_bytes, split_lines

if TYPE_CHECKING:
    from torch import Tensor

    from dynamo_lm.decoding.statistics import Statistics
    from dynamo_lm.model.modeling import DynaMoForCausalLM

SPEED, CHOICE, OUTPUT = "How many tokens per step", "How tokens are chosen", "Input, output and machine"


def generate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help='DynaMo model: a folder, a hub id, or "story" for the bundled one.')
    ],
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="[PROMPT]", help='The text to continue. Without it, or for "-", stdin is read.'),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", help="File with one prompt a line, all continued together.", rich_help_panel=OUTPUT),
    ] = None,
    verify: Annotated[
        str,
        typer.Option(
            metavar="strict|off|NATS",
            help="strict: exactly what the model would write one token at a time. "
            "off: the paper's dynamic sampling, faster, and as good as --eps-b lets it be. "
            "A number: as strict, but the text may be less likely than the model's own choices by that many nats a token.",
            rich_help_panel=SPEED,
        ),
    ] = "strict",
    eps_b: Annotated[
        float | None,
        typer.Option(
            "--eps-b",
            help="Quality dial of --verify off: 0 always gives as many tokens as there are heads, 1 always one. "
            "Default: the model's own, else 0.5.",
            rich_help_panel=SPEED,
        ),
    ] = None,
    alpha_c: Annotated[
        float | None,
        typer.Option(
            "--alpha-c",
            help="Weight of the counted tables: 1 trusts them fully (default), 0 does without.",
            rich_help_panel=SPEED,
        ),
    ] = None,
    heads: Annotated[
        int | None,
        typer.Option(
            "--heads",
            help="The most tokens a step may give; 1 is the plain model. Default: all heads.",
            rich_help_panel=SPEED,
        ),
    ] = None,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Compile the steps first: a minute or two, then a small model is much faster. For one long text.",
            rich_help_panel=SPEED,
        ),
    ] = False,
    tree: Annotated[
        int | None,
        typer.Option(
            "--tree",
            metavar="N",
            help="With strict, greedy: how many drafts a step verifies as a tree, 0 for a chain. "
            "Default: what is fastest here.",
            rich_help_panel=SPEED,
        ),
    ] = None,
    otsu: Annotated[
        bool | None,
        typer.Option(
            "--otsu/--no-otsu",
            help="With --verify off: drop unlikely combinations by Otsu's threshold. Default: on.",
            rich_help_panel=SPEED,
        ),
    ] = None,
    blur: Annotated[
        bool | None,
        typer.Option(
            "--blur/--no-blur",
            help="With --verify off: blur the combinations before that threshold. Default: on.",
            rich_help_panel=SPEED,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", help="Write at most this many tokens.", rich_help_panel=CHOICE)
    ] = 128,
    sample: Annotated[
        bool | None,
        typer.Option(
            "--sample/--greedy",
            help="Draw tokens at random, or take the most likely. Default: greedy with strict, sample with off.",
            rich_help_panel=CHOICE,
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="With --sample: below 1 is more cautious, above 1 more adventurous. Default: 0.7 with off, the "
            "model's with strict.",
            rich_help_panel=CHOICE,
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            "--top-k",
            help="Choose among this many most likely tokens. Default: 50 with off, the model's with strict.",
            rich_help_panel=CHOICE,
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            "--top-p",
            help="With strict and --sample: choose among the tokens that together have this probability.",
            rich_help_panel=CHOICE,
        ),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            "--repetition-penalty",
            help="Above 1 avoids tokens that are already there. Default: 1.1 with off, the model's with strict.",
            rich_help_panel=CHOICE,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Makes --sample repeatable: the same seed gives the same text. Default: another each time.",
            rich_help_panel=CHOICE,
        ),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            help="End the text after this string; may be given several times.", metavar="STRING", rich_help_panel=CHOICE
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="Precision to compute in: float32, bfloat16, float16, or auto (as saved).", rich_help_panel=OUTPUT
        ),
    ] = "auto",
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1, .. or auto (a GPU if there is one).", rich_help_panel=OUTPUT)
    ] = "auto",
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Tokenizer folder or hub id, if MODEL does not bring its own.", rich_help_panel=OUTPUT),
    ] = None,
    stats: Annotated[
        bool,
        typer.Option("--stats", help="Say on stderr what it cost: forward passes, tokens/s.", rich_help_panel=OUTPUT),
    ] = False,
    json: Annotated[
        bool,
        typer.Option("--json", help="One JSON object a line and prompt: text, statistics.", rich_help_panel=OUTPUT),
    ] = False,
) -> None:
    """Continue a text, several tokens per forward pass.

    Prints the prompt and its continuation on stdout and nothing else, so that it works in a pipe:

    `echo "Once upon a time" | dynamo-lm generate story`
    """
    import torch

    from dynamo_lm.backbone.token_limits import end_tokens
    from dynamo_lm.cli.options import verification
    from dynamo_lm.decoding.detokenizer import IncrementalDetokenizer
    from dynamo_lm.model.configuration import DynaMoConfig
    from dynamo_lm.model.loading import open_config, open_model, open_tokenizer, resolve

    # 1. What to continue, before the wait for the model.
    texts = _prompts(prompt, prompts)
    dial = verification(verify)
    if dial != "off" and any(value is not None for value in (eps_b, otsu, blur)):
        raise InputError("--eps-b, --otsu and --blur belong to --verify off; verified decoding has no use for them.")
    if dial == "off" and tree is not None:
        raise InputError("--tree does not apply to --verify off, which verifies no drafts; leave it out, or verify.")
    if verify == "off" and top_p is not None:
        raise InputError("--top-p does not apply to --verify off; use --top-k, or --verify strict.")
    if stop and "" in stop:
        raise InputError("--stop is empty; give the string that ends the text, or leave it out.")
    drawn = verify == "off" if sample is None else sample
    if not drawn and dial != "off" and any(value is not None for value in (temperature, top_k, top_p)):
        raise InputError("--temperature, --top-k and --top-p choose at random, so they need --sample.")
    if drawn and tree is not None:
        raise InputError("--tree is for greedy decoding; leave out either --tree or --sample.")

    # 2. The model and its tokenizer.
    name = resolve(model)
    config = open_config(name)
    if not isinstance(config, DynaMoConfig):
        raise InputError(f'"{model}" has no DynaMo heads; add some with `dynamo-lm train {model} --data ...`.')
    tokens = open_tokenizer(tokenizer or name, vocab_size=config.vocab_size)
    network = open_model(name, dtype=dtype, device=device, tokenizer=tokens)
    encoded = [tokens(text, verbose=False)["input_ids"] for text in texts]
    if any(not ids for ids in encoded):
        raise InputError("The prompt is empty; give a few words to begin with.")

    # 3. Rows of one length, padded on the left, where the attention mask hides it.
    width = max(map(len, encoded))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in encoded], device=network.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in encoded], device=network.device)
    seed = random.SystemRandom().randrange(2**31) if seed is None else seed
    given = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "stop_strings": stop or None,
        "eos_token_id": end_tokens(network.generation_config, tokens) or None,
    }

    # 4. Write, and print as it comes where there is one text.
    writers = [IncrementalDetokenizer(tokens, row, stop or []) for row in encoded]
    streaming = len(texts) == 1 and not json
    begun = False

    def stepped(row: int, new: list[int]) -> None:
        nonlocal begun
        more = writers[row].add(new)
        if streaming:
            _say(more if begun else texts[0] + more)
        begun = True

    output = _generate(
        network,
        ids,
        attention_mask=mask,
        verify=dial,
        num_heads=heads,
        eps_b=eps_b,
        alpha_c=alpha_c,
        otsu=otsu,
        blur=blur,
        tree=tree,
        compile=compiled,
        do_sample=drawn,
        max_new_tokens=max_new_tokens,
        seed=seed,
        tokenizer=tokens,
        on_step=stepped,
        return_dict_in_generate=True,
        **{key: value for key, value in given.items() if value is not None},
    )
    for number, (text, writer, statistics) in enumerate(zip(texts, writers, output.statistics, strict=True)):
        rest = writer.end()
        if json:
            facts = {"prompt": text, "text": text + writer.text, "new_text": writer.text, "seed": seed + number}
            print(json_format.dumps(facts | {"statistics": numbers(statistics)}, ensure_ascii=False), flush=True)
        elif streaming:
            _say(rest + "\n")
        else:
            _say(text + writer.text + "\n")
        if stats:
            print(sentence(statistics), file=sys.stderr)


def _generate(network: DynaMoForCausalLM, ids: Tensor, **kwargs: Any) -> Any:
    """`network.generate`, with what transformers says of impossible options as input errors."""
    try:
        return network.generate(ids, **kwargs)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error).strip().splitlines()[0]) from error


def numbers(statistics: Statistics) -> dict[str, Any]:
    """The statistics of one text as plain data; log-likelihood and regret are nats per token under the base model."""
    return {
        "forwards": statistics.forwards,
        "new_tokens": statistics.new_tokens,
        "tokens_per_step": round(statistics.tokens_per_step, 4),
        "ceiling": statistics.ceiling,
        "histogram": statistics.histogram,
        "acceptance": [round(share, 4) for share in statistics.acceptance],
        "mean_log_likelihood": round(statistics.mean_log_likelihood, 5),
        "mean_regret": round(statistics.mean_regret, 5),
        "seconds": round(statistics.seconds, 4),
    }


def sentence(statistics: Statistics) -> str:
    """The statistics of one text in words."""
    steps = ", ".join(f"{count} of {size}" for size, count in enumerate(statistics.histogram, start=1) if count)
    rate = statistics.new_tokens / statistics.seconds if statistics.seconds else 0.0
    said = (
        f"{statistics.new_tokens} tokens in {statistics.forwards} forward passes: {statistics.tokens_per_step:.2f} "
        f"per pass of at most {statistics.ceiling}; {rate:.0f} tokens/s; steps by size: {steps}; "
        f"log-likelihood {statistics.mean_log_likelihood:.3f} nats per token"
    )
    if statistics.unverified:
        said += f"; regret {statistics.mean_regret:.3f} nats per token"
    accepted = ", ".join(f"head {head} {share:.0%}" for head, share in enumerate(statistics.acceptance, start=2))
    return f"{said}; drafts accepted: {accepted}" if any(statistics.proposed) else said


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _prompts(prompt: str | None, file: Path | None) -> list[str]:
    """The texts to continue: from the argument, a file of them, or stdin; each has a character at least."""
    if file is not None:
        if prompt is not None:
            raise InputError("Give either a prompt or --prompts FILE, not both.")
        lines = split_lines(decode(read_bytes(file), file))
        while lines and not lines[-1].strip():
            lines.pop()
        empty = next((number for number, line in enumerate(lines, start=1) if not line.strip()), None)
        if empty is not None or not lines:
            raise InputError(f"{file} has an empty prompt in line {empty or 1}; give one prompt a line.")
        return lines
    if prompt is None or prompt == "-":
        if sys.stdin.isatty():
            raise InputError('There is no prompt; give one, as in `dynamo-lm generate story "Once upon a time"`.')
        data = getattr(sys.stdin, "buffer", sys.stdin).read()
        prompt = decode(data, "stdin") if isinstance(data, bytes) else data
        prompt = prompt.removesuffix("\n").removesuffix("\r")
    if not prompt:
        raise InputError("The prompt is empty; give a few words to begin with.")
    return [prompt]
