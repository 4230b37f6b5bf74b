"""The verbs of the command line, one file each. They read arguments, call the library and print; nothing else."""
