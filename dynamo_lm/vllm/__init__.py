"""Parallel heads inside vLLM: what its plug-in point `vllm.general_plugins` calls where this package is installed.

In: a folder that `dynamo-lm export --to vllm` wrote. Out: a draft model of vLLM's own, under the architecture below.
"""

ARCHITECTURE = "DynaMoForCausalLMEagle3"  # vLLM takes for EAGLE-3 what ends so


def register() -> None:
    """Makes the heads known to vLLM, in each of its processes; imports nothing of them yet."""
    from vllm import ModelRegistry  # type: ignore[import-not-found]

    ModelRegistry.register_model(ARCHITECTURE, "dynamo_lm.vllm.parallel_heads:ParallelHeads")
