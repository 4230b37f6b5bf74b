"""The model: configuration, modules, files."""
