"""A DynaMo model behind OpenAI's HTTP interface; see docs/serving.md. Needs the packages of the extra `serve`."""
