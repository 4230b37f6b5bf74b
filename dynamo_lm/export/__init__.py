"""A sequential head in the files of other programs: vLLM, SGLang, llama.cpp."""
