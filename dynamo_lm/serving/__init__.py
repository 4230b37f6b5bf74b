"""A DynaMo model with OpenAI's HTTP interface; see docs/serving.md. Needs the packages of the extra `serve`."""
