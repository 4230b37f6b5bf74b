"""A DynaMo model for lm-evaluation-harness: head 1 gives likelihoods, `DynaMoForCausalLM.generate` writes texts.

Importing this module registers the model "dynamo-lm". The harness has no plug-ins, so its own command line finds the model,
and the task files of `dynamo_lm.evaluation.nlu.tasks`, through

    python -m dynamo_lm.evaluation.nlu.harness --model dynamo-lm --model_args pretrained=FOLDER --tasks local_arc_easy,piqa

which hands every argument over to `lm_eval`; `--model_args` also takes verify=strict|off|NATS, eps_b, heads. `accelerate
launch --num_processes N -m ..` in place of `python -m ..` shares every task's documents among processes. Head 1 is the
base's own last layer, so a model whose base was frozen in training scores as its base. Knows nothing about terminals.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.tasks.manager import TaskDict
from torch import Tensor
from transformers import PreTrainedModel

from dynamo_lm.backbone.base_model import fingerprint, load_base
from dynamo_lm.decoding.statistics import Statistics
from dynamo_lm.errors import InputError, first_line
from dynamo_lm.evaluation.nlu.tasks import FOLDER, bench_folder
from dynamo_lm.model.configuration import DynaMoConfig
from dynamo_lm.model.loading import open_config, open_for_evaluation, resolve
from dynamo_lm.model.modeling import DynaMoForCausalLM
from dynamo_lm.training import provenance

PREFIX = "local_"  # of our tasks' names, which would otherwise collide with the harness's own
BOOTSTRAP = 1000  # resamples for the standard error of a perplexity; those of accuracies are in closed form
TOKENS = 256  # the most new tokens of a text where the task says nothing, as in the harness

Progress = Callable[[int, int], None]  # answers so far, of how many
Metrics = dict[str, dict[str, float | None]]  # {metric: {"value", "stderr"}}; no stderr where the harness has none


class Head1(HFLM):
    """An opened causal language model that reports its progress."""

    def __init__(self, pretrained: Any, tokenizer: Any, *, context: int | None, batch_size: int = 1, **kwargs: Any):
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise InputError("The tokenizer has neither a first nor a last token of a text, one of which the harness needs.")
        with quiet():
            super().__init__(
                pretrained=pretrained,
                tokenizer=tokenizer,
                backend="causal",
                batch_size=batch_size,
                **{"max_length": context} | kwargs,
            )
        self.progress: Progress = lambda done, total: None
        self.done, self.total = 0, 0

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        self.done, self.total = 0, len(requests)
        answers = super()._loglikelihood_tokens(requests, *args, **kwargs)
        self.progress(self.total, self.total)  # some answers share a forward pass
        return answers

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        logits = super()._model_call(inps, *args, **kwargs)
        self.done += inps.shape[0]
        self.progress(self.done, self.total)
        return logits


@register_model("dynamo-lm")
class DynaMoLM(Head1):
    """A DynaMo model by name ("story", a folder, a hub id) or opened.

    Args:
        verify, eps_b, heads: how texts are written, see `DynaMoForCausalLM.generate`. Likelihoods do not depend on them.
        seed: of texts that are sampled.
    """

    def __init__(
        self,
        pretrained: str | DynaMoForCausalLM,
        tokenizer: Any = None,
        *,
        verify: str | float = "strict",
        eps_b: float | None = None,
        heads: int | None = None,
        seed: int = 0,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,  # of the harness's automatic batch size, which this model does not do
        **kwargs: Any,
    ):
        ranks = _accelerator() if isinstance(pretrained, str) else None
        if isinstance(pretrained, str):
            pretrained, tokenizer = open_for_evaluation(
                pretrained, tokenizer=tokenizer, dtype=dtype, device=_available(device or "auto")
            )
        if str(batch_size).startswith("auto"):
            raise InputError("--batch_size auto is not supported; give a number.")
        context = pretrained.config.max_context
        super().__init__(pretrained, tokenizer, context=context, batch_size=int(batch_size or 1), **kwargs)
        if ranks is not None:
            self.accelerator, self._rank, self._world_size = ranks, ranks.process_index, ranks.num_processes
        self.decoding: dict[str, Any] = {"verify": verify, "eps_b": eps_b, "num_heads": heads, "seed": seed}

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """One text at a time: the texts of a batch would share their time."""
        texts: list[str] = []
        for request in requests:
            texts.append(self.complete(*request.args)[0])
            self.progress(len(texts), len(requests))
        return texts

    def complete(self, context: str, options: dict[str, Any], **decoding: Any) -> tuple[str, Statistics]:
        """Continues `context` by a task's `generation_kwargs`, cut before the first stop string.

        A prompt that leaves too little room in the model's context loses its beginning, as in the harness. The repetition
        penalty of Algorithm 1 is off: it would punish answers that repeat the question's own words and numbers.
        """
        given = normalize_gen_kwargs(options, TOKENS)
        stops = [stop for stop in given.get("until", []) if stop]
        ids = self.tok_encode(context) or [self.prefix_token_id]
        room = self.room(given["max_gen_toks"])
        ids = ids[-room:]
        sampling = {key: given[key] for key in ("temperature", "top_k", "top_p") if given.get("do_sample") and key in given}
        output = self.model.generate(
            torch.tensor([ids], device=self.device),
            max_new_tokens=min(given["max_gen_toks"], self.max_length - len(ids)),
            do_sample=bool(given.get("do_sample")),
            repetition_penalty=1.0,
            eos_token_id=self.eot_token_id,
            stopping_criteria=[_Stop(self.tokenizer, stops, len(ids))] if stops else None,
            return_dict_in_generate=True,
            **sampling,
            **self.decoding | decoding,
        )
        text = self.tok_decode(output.sequences[0, len(ids) :].tolist())
        return postprocess_generated_text(text, stops, None), output.statistics[0]

    def room(self, new_tokens: int) -> int:
        """The longest prompt in tokens that leaves room for so many new ones, or for half the context if that is less."""
        return self.max_length - min(new_tokens, self.max_length // 2)


def _accelerator() -> Any:
    """The ranks that `accelerate launch` or `torchrun` started, met, each on its own device; None: there is one process."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    from accelerate import Accelerator

    return Accelerator(cpu=not torch.cuda.is_available())  # without a GPU it looks for ranks only where told so


class _Stop:
    """Whether the new text holds a stop string; ids: (1, length)."""

    def __init__(self, tokenizer: Any, strings: Sequence[str], prompt_length: int):
        self.tokenizer, self.strings, self.begin = tokenizer, strings, prompt_length
        self.back = max(len(string.encode()) for string in strings) + 4  # tokens it can span, each a byte or more

    def __call__(self, ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        end = self.tokenizer.decode(ids[0, max(self.begin, ids.shape[1] - self.back) :].tolist())
        return torch.tensor([any(string in end for string in self.strings)])


@dataclass(frozen=True)
class Base:
    """What a model's first head is compared with."""

    model: PreTrainedModel | None  # None: there is nothing to compare with
    name: str
    same: bool  # as the model's first head, so that one measurement serves both
    note: str  # where it comes from, or why it is missing


def original_base(model: DynaMoForCausalLM, folder: str, named: str | None = None) -> Base:
    """The base that a model's heads were added to, as it was before training.

    Args:
        folder: where the model was opened.
        named: by the user. Else the recorded one, if it is a folder on this machine; the model's own if it was frozen.

    Raises:
        InputError: `named` cannot be opened, or is not a base of this model.
    """
    recorded = model.config.base_name_or_path
    training = provenance.read(Path(folder)) or {}
    options = training.get("options", {})
    frozen = model.config.weights == "heads" or (options.get("lr_b") == 0 == options.get("lr_mb"))
    if named is None and frozen:
        name = Path(recorded).name if recorded else "its own"
        return Base(model.base, name, True, "Training left the base as it was, so one measurement serves both columns.")
    if named is None and not (recorded and Path(recorded).is_dir()):
        why = f'"{recorded}" is not a folder on this machine' if recorded else "no base is recorded"
        note = f"The base was trained with the heads and {why}: there is no base to compare with (--base names one)."
        return Base(None, "", False, note)
    name = resolve(named or str(recorded))
    if isinstance(open_config(name), DynaMoConfig):
        raise InputError(f'--base "{named}" is a DynaMo model itself; name the model that its heads were added to.')
    base = load_base(name, dtype=model.dtype).to(model.device).eval()  # type: ignore[arg-type]
    theirs, ours = base.config.get_text_config().vocab_size, model.config.vocab_size
    if theirs != ours:
        raise InputError(
            f'--base "{name}" has a vocabulary of {theirs}, the model has {ours}; name the base it was made of.'
        )
    same = fingerprint(base) == fingerprint(model.base)
    note = "The base is the model's own, so one measurement serves both columns." if same else "Training changed the base."
    return Base(base, Path(name).name, same, note)


def local_tasks() -> dict[str, str]:
    """{name: the harness's name} of the tasks that need no network; nothing of theirs runs generated code."""
    names = sorted(file.stem for file in FOLDER.glob("*.yaml"))
    return {name: PREFIX + name for name in names if not name.endswith("_run")}


@dataclass(frozen=True)
class Question:
    """A loaded task or group of tasks."""

    name: str  # what the user calls it
    identity: str  # what the harness calls it
    loaded: TaskDict  # with the documents
    shots: dict[str, int | None]  # examples that each task takes by default; 0 if it never takes any
    generative: bool  # texts are written, not likelihoods compared


def questions(
    names: Sequence[str], *, hub: bool = False, data: str | Path | None = None, run_code: bool = False
) -> list[Question]:
    """Looks tasks up and reads their documents, so that a wrong name or file is reported before a model is opened.

    Raises:
        InputError: an unknown task, no benchmark folder, a damaged file, a hub that cannot be reached, generated code that
            the user did not allow to run.
    """
    with quiet():
        if hub:
            manager = TaskManager()
            identities = {name: name for name in manager.all_tasks}
        else:
            manager = TaskManager(
                include_path=str(FOLDER), include_defaults=False, metadata={"data": str(bench_folder(data))}
            )
            identities = local_tasks()
        unknown = next((name for name in names if name not in identities), None)
        if unknown is not None:
            local = f"give one of {', '.join(identities)}, or --hub for the harness's own"
            choice = "see `lm_eval ls tasks`" if hub else local
            raise InputError(f'There is no task "{unknown}"; {choice}.')
        questions = []
        for name in dict.fromkeys(names):
            identity = identities[name] + ("_run" if run_code and not hub and name == "humaneval" else "")
            loaded = _load(manager, identity, name)
            tasks = loaded["tasks"]
            if any(getattr(task, "UNSAFE_CODE", False) for task in tasks.values()) and not run_code:
                raise InputError(f'"{name}" runs code that the model writes; allow it with --run-code, or leave it out.')
            kinds = {task.OUTPUT_TYPE == "generate_until" for task in tasks.values()}
            if len(kinds) > 1:
                raise InputError(f'"{name}" mixes tasks of likelihoods and of texts; name its members one by one.')
            own = {key: task.get_config("num_fewshot") for key, task in tasks.items()}
            questions.append(Question(name, identity, loaded, own, kinds.pop()))
        return questions


def _load(manager: TaskManager, identity: str, name: str) -> TaskDict:
    try:
        return manager.load([identity])
    except InputError:
        raise
    except Exception as error:  # templates fail at missing fields, and download libraries without a network, in many ways
        reason = first_line(error)
        if identity.startswith(PREFIX):
            raise InputError(f'The file of "{name}" does not have the fields that the task reads: {reason}.') from error
        raise InputError(f'The task "{name}" could not be loaded from the hub: {reason}') from error


@dataclass(frozen=True)
class Answer:
    """The harness's result; `parts` are the members of a group."""

    metrics: Metrics
    samples: int
    parts: dict[str, Answer]


def ask(lm: LM, question: Question, *, limit: int | None, shots: int | None, seed: int, run_code: bool = False) -> Answer:
    """Evaluates a model on a question; standard errors are the harness's own.

    Args:
        limit: documents of each task, the first so many; all if None.
        shots: examples before each question; the task's own number if None. Tasks that fix none take none (BLiMP).
        seed: of the choice of examples.
    """
    for name, task in question.loaded["tasks"].items():
        own = question.shots[name]
        task.set_config("num_fewshot", shots if shots is not None and own != 0 else own or 0)
        task.set_fewshot_seed(seed)
    with quiet():
        results = evaluate(
            lm,
            question.loaded,
            limit=limit,
            bootstrap_iters=BOOTSTRAP,
            log_samples=False,
            confirm_run_unsafe_code=run_code,
        )
    answers = {name: _answer(numbers) for name, numbers in results["results"].items()}
    whole = answers.pop(question.identity, None)
    if whole is None:  # a tag: its tasks stand side by side
        samples = sum(answer.samples for answer in answers.values())
        return Answer({}, samples, answers)
    shortened = {name.removeprefix(question.identity + "::").replace("::", "/"): part for name, part in answers.items()}
    return Answer(whole.metrics, whole.samples, shortened)


def _answer(numbers: dict[str, Any]) -> Answer:
    """Of the harness's keys "acc,none" and "acc_stderr,none": metric, filter."""
    metrics: Metrics = {}
    for key, value in numbers.items():
        metric, comma, used = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            stderr = numbers.get(f"{metric}_stderr,{used}")
            spread = float(stderr) if isinstance(stderr, (int, float)) else None
            metrics[metric if used == "none" else f"{metric}, {used}"] = {"value": float(value), "stderr": spread}
    return Answer(metrics, int(numbers.get("sample_len", 0)), {})


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppresses the harness's output, warnings and progress bars."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(before)


def _available(device: str) -> str:
    """The harness's command line asks for a GPU by default."""
    return "auto" if device.startswith("cuda") and not torch.cuda.is_available() else device


def arguments(typed: Sequence[str]) -> list[str]:
    """What `lm_eval` is given: as typed, and the folder of our tasks where it runs any."""
    named = any(word.split("=")[0] == "--include_path" for word in typed)
    runs = bool(typed) and (typed[0] == "run" or typed[0].startswith("--")) and "--help" not in typed
    return [*typed, "--include_path", str(FOLDER)] if runs and not named else list(typed)


def main() -> None:
    """`lm_eval`'s own command line with our model registered and our tasks found."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv[1:] = arguments(sys.argv[1:])
    try:
        cli_evaluate()
    except InputError as error:
        print(f"dynamo-lm: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
