"""`dynamo-lm generate`: text in, continued text out."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from dynamo_lm.cli.dataclass_options import dataclass_options
from dynamo_lm.cli.options import MACHINE, DecodingModelOptions, Model, verification
from dynamo_lm.errors import InputError
from dynamo_lm.files import decode, read_bytes, split_lines

if TYPE_CHECKING:
    from dynamo_lm.decoding.statistics import Statistics
    from dynamo_lm.model.modeling import DynaMoForCausalLM

INCOHERENT = 1.0  # nats per token of regret
ENOUGH_TOKENS = 16  # for such a mean


@dataclass(frozen=True, kw_only=True)
class SpeedOptions:
    """How many tokens a step gives; the fields are arguments of `model.generate`."""

    PANEL: ClassVar[str] = "How many tokens per step"

    verify: Annotated[
        str,
        typer.Option(
            metavar="strict|off|NATS",
            help="strict: exactly what the model would write one token at a time. "
            "off: the paper's dynamic sampling, faster, and as good as --eps-b lets it be. "
            "A number: as strict, but the text may be less likely than the model's own choices by that many nats a token.",
        ),
    ] = "strict"
    eps_b: Annotated[
        float | None,
        "Quality threshold of --verify off: 0 always gives as many tokens as there are heads, 1 always one. "
        "Default: the model's own, else 0.5.",
    ] = None
    alpha_c: Annotated[
        float | None,
        "Weight of the counted tables, and in drafts of the text's own n-grams; 0 does without. Default with off: 1.",
    ] = None
    num_heads: Annotated[
        int | None,
        typer.Option("--heads", help="The most tokens a step may give; 1 is the plain model. Default: all heads."),
    ] = None
    compile: Annotated[
        bool, "Compile the steps first: a minute or two, then a small model is much faster. For one long text."
    ] = False
    tree: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="With strict, greedy: how many drafts a step verifies as a tree, 0 for a chain. "
            "Default: what is fastest on this machine.",
        ),
    ] = None
    prompt_lookup_num_tokens: Annotated[
        int | None,
        typer.Option(
            "--prompt-lookup",
            metavar="N",
            help="With strict or a number: where the text repeats itself, draft up to this many tokens from what it says "
            "already; 0 for none. Default: the model's own, else 0.",
        ),
    ] = None
    otsu: Annotated[
        bool | None,
        typer.Option(
            "--otsu/--no-otsu",
            help="With --verify off: drop unlikely combinations by Otsu's threshold. Default: on.",
        ),
    ] = None
    blur: Annotated[
        bool | None,
        typer.Option(
            "--blur/--no-blur", help="With --verify off: blur the combinations before that threshold. Default: on."
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ChoiceOptions:
    """How tokens are chosen; the fields are arguments of `model.generate`."""

    PANEL: ClassVar[str] = "How tokens are chosen"

    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Write at most this many tokens.")] = 128
    do_sample: Annotated[
        bool | None,
        typer.Option(
            "--sample/--greedy",
            help="Draw tokens at random, or take the most likely. Default: greedy with strict, sample with off.",
        ),
    ] = None
    temperature: Annotated[
        float | None,
        "With --sample: below 1 is more cautious, above 1 more adventurous. Default: 0.7 with off, the model's with strict.",
    ] = None
    top_k: Annotated[
        int | None, "Choose among this many most likely tokens. Default: 50 with off, the model's with strict."
    ] = None
    top_p: Annotated[
        float | None, "With strict and --sample: choose among the tokens that together have this probability."
    ] = None
    repetition_penalty: Annotated[
        float | None, "Above 1 avoids tokens that are already there. Default: 1.1 with off, the model's with strict."
    ] = None
    seed: Annotated[
        int | None, "Makes --sample repeatable: the same seed gives the same text. Default: another each time."
    ] = None
    stop_strings: Annotated[
        list[str] | None,
        typer.Option("--stop", help="End the text after this string; may be given several times.", metavar="STRING"),
    ] = None


@dataclass_options
def generate(
    model: Model,
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="[PROMPT]", help='The text to continue. Without it, or for "-", stdin is read.'),
    ] = None,
    *,
    speed: SpeedOptions,
    choice: ChoiceOptions,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", help="File with one prompt a line, all continued together.", rich_help_panel=MACHINE),
    ] = None,
    stats: Annotated[
        bool,
        typer.Option("--stats", help="Say on stderr what it cost: forward passes, tokens/s.", rich_help_panel=MACHINE),
    ] = False,
    json: Annotated[
        bool,
        typer.Option("--json", help="One JSON object a line and prompt: text, statistics.", rich_help_panel=MACHINE),
    ] = False,
    opening: DecodingModelOptions,
) -> None:
    """Continue a text, several tokens per forward pass.

    Prints the prompt and its continuation on stdout and nothing else, so that it works in a pipe:

    `echo "Once upon a time" | dynamo-lm generate story`
    """
    texts = _prompts(prompt, prompts)
    arguments = _arguments(speed, choice)
    network, tokenizer = opening.open(model)
    encoded = [tokenizer(text, verbose=False)["input_ids"] for text in texts]
    if any(not ids for ids in encoded):
        raise InputError("The prompt is empty; give a few words to begin with.")
    streaming = len(texts) == 1 and not json
    _write(network, tokenizer, texts, encoded, arguments, streaming=streaming, as_json=json, stats=stats)


def _arguments(speed: SpeedOptions, choice: ChoiceOptions) -> dict[str, Any]:
    """The arguments of `model.generate`, those that are left open left out; checked before the wait for the model.

    Raises:
        InputError: options that do not go together.
    """
    verify = verification(speed.verify)
    off = verify == "off"
    sample = off if choice.do_sample is None else choice.do_sample
    random_choice = any(value is not None for value in (choice.temperature, choice.top_k, choice.top_p))
    for wrong, message in (
        (
            not off and any(value is not None for value in (speed.eps_b, speed.otsu, speed.blur)),
            "--eps-b, --otsu and --blur belong to --verify off; verified decoding has no use for them.",
        ),
        (
            off and speed.tree is not None,
            "--tree does not apply to --verify off, which verifies no drafts; leave it out, or verify.",
        ),
        (
            off and speed.prompt_lookup_num_tokens is not None,
            "--prompt-lookup does not apply to --verify off, which verifies no drafts; leave it out, or verify.",
        ),
        (
            off and choice.top_p is not None,
            "--top-p does not apply to --verify off; use --top-k, or --verify strict.",
        ),
        ("" in (choice.stop_strings or []), "--stop is empty; give the string that ends the text, or leave it out."),
        (
            not sample and not off and random_choice,
            "--temperature, --top-k and --top-p choose at random, so they need --sample.",
        ),
        (
            sample and speed.tree is not None,
            "--tree is for greedy decoding; leave out either --tree or --sample.",
        ),
    ):
        if wrong:
            raise InputError(message)
    seed = random.SystemRandom().randrange(2**31) if choice.seed is None else choice.seed
    arguments = asdict(speed) | asdict(choice) | {"verify": verify, "do_sample": sample, "seed": seed}
    return {name: value for name, value in arguments.items() if value not in (None, [])}


def _write(
    network: DynaMoForCausalLM,
    tokenizer: Any,
    texts: list[str],
    encoded: list[list[int]],
    arguments: dict[str, Any],
    *,
    streaming: bool,
    as_json: bool,
    stats: bool,
) -> None:
    """Continues the texts, and prints them: with `streaming` the only one as it comes."""
    import torch

    from dynamo_lm.backbone.token_limits import end_tokens
    from dynamo_lm.decoding.detokenizer import IncrementalDetokenizer
    from dynamo_lm.model.loading import print_json

    # Prompts of one length, padded on the left, where the attention mask hides it.
    width = max(map(len, encoded))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in encoded], device=network.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in encoded], device=network.device)
    detokenizers = [IncrementalDetokenizer(tokenizer, row, arguments.get("stop_strings", [])) for row in encoded]
    begun = False

    def on_step(number: int, tokens: list[int]) -> None:
        nonlocal begun
        new_text = detokenizers[number].add(tokens)
        if streaming:
            _print(new_text if begun else texts[0] + new_text)
        begun = True

    try:
        output = network.generate(
            ids,
            attention_mask=mask,
            eos_token_id=end_tokens(network.generation_config, tokenizer) or None,
            tokenizer=tokenizer,
            on_step=on_step,
            return_dict_in_generate=True,
            **arguments,
        )
    except InputError:
        raise
    except ValueError as error:  # what transformers says of impossible options
        raise InputError(str(error).strip().splitlines()[0]) from error
    for number, (text, written, statistics) in enumerate(zip(texts, detokenizers, output.statistics, strict=True)):
        rest = written.end()
        if as_json:
            line: dict[str, Any] = {"prompt": text, "text": text + written.text, "new_text": written.text}
            line |= {"seed": arguments["seed"] + number, "statistics": numbers(statistics)}
            print_json(line, indent=None)
        else:
            _print((rest if streaming else text + written.text) + "\n")
        if stats:
            print(sentence(statistics), file=sys.stderr)
    warning = weak_heads(output.statistics, verify=arguments["verify"], temperature=arguments.get("temperature"))
    if warning is not None:
        print(f"dynamo-lm: {warning}", file=sys.stderr)


def numbers(statistics: Statistics) -> dict[str, Any]:
    """The statistics of one text as plain data; log-likelihood and regret are nats per token under the base model."""
    return {
        "forwards": statistics.forwards,
        "new_tokens": statistics.new_tokens,
        "tokens_per_step": round(statistics.tokens_per_step, 4),
        "ceiling": statistics.ceiling,
        "histogram": statistics.histogram,
        "acceptance": [round(share, 4) for share in statistics.acceptance],
        "looked_up": statistics.looked_up,
        "lookup_accepted": statistics.lookup_accepted,
        "mean_log_likelihood": round(statistics.mean_log_likelihood, 5),
        "mean_regret": round(statistics.mean_regret, 5),
        "seconds": round(statistics.seconds, 4),
    }


def sentence(statistics: Statistics) -> str:
    """The statistics of one text in words."""
    steps = ", ".join(f"{count} of {size}" for size, count in enumerate(statistics.histogram, start=1) if count)
    rate = statistics.new_tokens / statistics.seconds if statistics.seconds else 0.0
    text = (
        f"{statistics.new_tokens} tokens in {statistics.forwards} forward passes: {statistics.tokens_per_step:.2f} "
        f"per pass of at most {statistics.ceiling}; {rate:.0f} tokens/s; steps by size: {steps}; "
        f"log-likelihood {statistics.mean_log_likelihood:.3f} nats per token"
    )
    if statistics.unverified:
        text += f"; regret {statistics.mean_regret:.3f} nats per token"
    heads = enumerate(statistics.acceptance, start=2) if any(statistics.proposed) else ()
    accepted = [f"head {head} {share:.0%}" for head, share in heads]
    if statistics.looked_up:
        accepted.append(f"from the text {statistics.lookup_accepted / statistics.looked_up:.0%}")
    return f"{text}; drafts accepted: {', '.join(accepted)}" if accepted else text


def weak_heads(statistics: Sequence[Statistics], *, verify: Any, temperature: float | None) -> str | None:
    """A warning for texts of --verify off that cost the base more than sampling from it does, or None.

    Args:
        verify, temperature: what the texts were written with; above temperature 1 the base's own texts cost as much.

    The base's own samples at temperature 0.7 cost 0.2 to 0.7 nats per token (SmolLM2-135M-Instruct, 6 prompts).
    """
    if verify != "off" or (temperature or 0.0) > 1:
        return None
    scored = sum(text.scored for text in statistics)
    regret = sum(text.regret for text in statistics) / max(1, scored)
    if scored < ENOUGH_TOKENS or regret <= INCOHERENT:
        return None
    return (
        f"The base finds each token {regret:.1f} nats less likely than its own first choice; above {INCOHERENT:g} texts are "
        "often incoherent. The heads are too weak for this eps_b: give a larger --eps-b (`dynamo-lm calibrate` finds one) "
        "or --verify strict."
    )


def _print(text: str) -> None:
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
