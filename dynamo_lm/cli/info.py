"""`dynamo-lm info`: what is in a folder, read from its small files; weights are not loaded."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from dynamo_lm.cli.dataclass_options import dataclass_options


@dataclass_options
def info(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help='A model folder, a hub id, or "story" for the bundled model.')
    ],
    json: Annotated[bool, "Print JSON instead of lines for people."] = False,
) -> None:
    """Say what a model folder holds: base, heads, tables, what it was trained on.

    Reads configuration and tables but no weights, so it is quick for models of any size.
    """
    from dynamo_lm.kernels import loader
    from dynamo_lm.model.loading import print_json, resolve

    facts = describe(resolve(model)) | {"kernels": loader.status()}
    if json:
        print_json(facts)
        return
    for name, value in [*lines(facts), ("kernels", facts["kernels"])]:
        print(f"{name:<12}{value}")


def describe(name: str) -> dict[str, Any]:
    """Everything `info` knows about a folder or hub id, as plain data."""
    from dynamo_lm import DynaMoForCausalLM
    from dynamo_lm.backbone.token_limits import stated_context
    from dynamo_lm.model.base_location import base_sources
    from dynamo_lm.model.configuration import DynaMoConfig
    from dynamo_lm.model.loading import open_config, skeleton
    from dynamo_lm.training.provenance import IDENTITY

    config = open_config(name)
    text = config.get_text_config()
    facts: dict[str, Any] = {
        "model": name,
        "dynamo": isinstance(config, DynaMoConfig),
        "architecture": text.model_type,
        "layers": getattr(text, "num_hidden_layers", None),
        "hidden_size": getattr(text, "hidden_size", None),
        "vocab_size": getattr(text, "vocab_size", None),
        "context": stated_context(config),
        "dtype": str(config.dtype or getattr(text, "dtype", None) or "float32").removeprefix("torch."),
    }
    network = skeleton(config)
    if not isinstance(network, DynaMoForCausalLM) or not isinstance(config, DynaMoConfig):
        return facts | {"parameters": sum(p.numel() for p in network.parameters())}
    base = sum(p.numel() for p in network.base.parameters())
    facts |= {
        "base": config.base_name,
        "base_path": config.base_path,
        "base_sources": base_sources(name, config) if config.weights == "heads" else [],
        "base_fingerprint": config.base_fingerprint,
        **{name: getattr(config, name) for name in IDENTITY["model"]},
        "coupling_parameters": sum(p.numel() for p in network.coupling.parameters()) if network.coupling is not None else 0,
        "weights": config.weights,
        "quantization": config.quantization,
        "parameters": base,
        "head_parameters": round(network.overhead() * base),
        "overhead": round(network.overhead(), 5),
        "defaults": _defaults(name),
        "table": _table(name),
        "training": _training(name),
    }
    return facts


def lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """The same for people: a name and a sentence each."""
    size = f"{facts['layers']} layers x {facts['hidden_size']}, vocabulary {facts['vocab_size']:,}"
    context = f"{facts['context']:,} tokens" if facts["context"] else "not stated"
    if not facts["dynamo"]:
        return [
            ("model", facts["model"]),
            ("type", f"{facts['architecture']}, {size}"),
            ("parameters", f"{facts['parameters']:,}, {facts['dtype']}"),
            ("context", context),
            ("heads", f"no DynaMo heads; add some with `dynamo-lm train {facts['model']} --data TEXT --out FOLDER`"),
        ]
    weights = "included"
    if facts["weights"] == "heads":
        sources, recorded = facts["base_sources"], facts["base_path"] or facts["base"]
        weights = f"not included: loaded from {sources[0]}" if sources else f"not included and not at {recorded}: see --base"
    heads = f"{facts['head_parameters']:,} of heads ({facts['overhead']:.2%} more)"
    return [
        ("model", facts["model"]),
        ("base", f"{facts['base'] or 'a model of its own'} ({facts['architecture']}, {size}), {weights}"),
        *_head_lines(facts),
        ("parameters", f"{facts['parameters']:,} + {heads}"),
        ("dtype", facts["dtype"] + (f", weights {facts['quantization']}" if facts["quantization"] else "")),
        ("context", context),
        *_table_lines(facts["table"]),
        *_training_lines(facts["training"]),
        ("defaults", ", ".join(f"{key} {value}" for key, value in facts["defaults"].items())),
    ]


def _head_lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    from dynamo_lm.model.configuration import MEDUSA

    rank, layers = facts["adapter_rank"], facts["layers_per_head"]
    kind = f"rank-{rank} adapters" if rank else f"{layers} layer{'' if layers == 1 else 's'} each"
    kind += ", a residual block each" if facts["residual_block"] else ""
    kind += ", own output embeddings" if facts["own_output_embedding"] else ""
    if all(facts[key] == value for key, value in MEDUSA.items()):
        kind = "of the Medusa kind: a residual block and an output embedding each"
    feed = "penultimate" if facts["feed"] == "stem" else "last"
    init = "at random" if facts["init"] == "random" else "as copies of the last layer"
    n = facts["num_heads"]
    lines = [
        ("heads", f"{n} (T{n}): the base's own and {n - 1} more, {kind}"),
        ("", f"fed by the {feed} layer" + ("" if rank or not layers else f", begun {init}")),
    ]
    if facts["head"] == "eagle3":
        vocabulary = f", over {facts['draft_vocab_size']:,} tokens" if facts["draft_vocab_size"] else ""
        return [("heads", f"{n} (T{n}): the base's own and one of the kind eagle3, which drafts {n - 1} tokens{vocabulary}")]
    if facts["coupling_rank"]:
        coupling = f"learned, of rank {facts['coupling_rank']}: {facts['coupling_parameters']:,} of the heads' parameters"
        lines.append(("coupling", coupling))
    return lines


def _table_lines(table: dict[str, Any] | None) -> list[tuple[str, str]]:
    if table is None:
        return [("tables", "none; count some with `dynamo-lm count`")]
    rows = ", ".join(f"{n:,} {name}" for n, name in zip(table["rows"][1:], ("pairs", "triples", "quadruples"), strict=False))
    pruned = ", ".join(f"{share:.1%}" for share in table["pruned_mass"][1:])
    lines = [("tables", f"{rows}; {table['megabytes']} MB; pruned mass {pruned}")]
    return lines + ([("", f"counted: {table['description']}")] if table["description"] else [])


def _training_lines(record: dict[str, Any] | None) -> list[tuple[str, str]]:
    if record is None:
        return [("trained on", "not recorded")]
    data = record.get("data", {})
    sources = ", ".join(data.get("sources", [])) or "unknown"
    tokens = f"{data.get('training_tokens', 0):,} tokens"
    lines = [("trained on", f"{sources} ({tokens}), {record.get('steps', '?')} steps")]
    if record.get("perplexities"):
        values = ", ".join(f"{name} {value:.2f}" for name, value in record["perplexities"].items())
        lines.append(("held out", values))
    return lines


def _defaults(name: str) -> dict[str, Any]:
    """What `generate` does by default: the folder's generation_config.json over Algorithm 1's own."""
    from transformers import GenerationConfig

    from dynamo_lm.sampling.options import Algorithm1

    defaults = {"verify": "strict", "prompt_lookup_num_tokens": 0} | asdict(Algorithm1())
    try:
        own = GenerationConfig.from_pretrained(name).to_dict()
    except (OSError, ValueError):
        return defaults
    return defaults | {key: own[key] for key in defaults if own.get(key) is not None}


def _table(name: str) -> dict[str, Any] | None:
    from dynamo_lm.cooccurrence.table import Cooccurrence
    from dynamo_lm.model.checkpoint import TABLE_FILE, _find

    file = _find(name, TABLE_FILE)
    return None if file is None else summary(Cooccurrence.load(file), Path(file))


def summary(table: Any, file: Path) -> dict[str, Any]:
    """A table as plain data."""
    return {
        "order": table.order,
        "vocab_size": table.vocab_size,
        "rows": [table.num_rows(order) for order in range(1, table.order + 1)],
        "counted": list(table.totals),
        "min_counts": list(table.min_counts),
        "pruned_mass": [round(share, 6) for share in table.pruned_mass],
        "megabytes": round(file.stat().st_size / 1e6, 2),
        "tokenizer": table.tokenizer,
        "description": table.description,
    }


def _training(name: str) -> dict[str, Any] | None:
    from dynamo_lm.model.checkpoint import _find
    from dynamo_lm.training import provenance

    file = _find(name, provenance.FILE)
    return None if file is None else provenance.read(Path(file).parent)
