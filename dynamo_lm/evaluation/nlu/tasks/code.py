"""Scores of a HumanEval completion: whether Python can parse it and, only where the user asked for it, whether it passes.

`executed` runs generated code in a separate process with limits on time, memory and file size, in an empty folder. That
keeps accidents small; it does not protect against malicious code.
"""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from typing import Any

SECONDS = 10
LIMITS = f"""import resource
for limit, value in ((resource.RLIMIT_AS, 2**30), (resource.RLIMIT_CPU, {SECONDS}), (resource.RLIMIT_FSIZE, 2**20)):
    resource.setrlimit(limit, (value, value))
"""


def parsed(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """{"valid": 1.0 or 0.0}: whether prompt and completion are Python, and the function does more than state
    its purpose."""
    return {"valid": float(_valid(document["prompt"] + results[0], document["entry_point"]))}


def executed(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """As `parsed`, and "pass@1": whether the program passes the document's tests."""
    program = document["prompt"] + results[0]
    test = f"{LIMITS}{program}\n{document['test']}\ncheck({document['entry_point']})\n"
    valid = _valid(program, document["entry_point"])
    return {"pass@1": float(valid and succeeds(test)), "valid": float(valid)}


def succeeds(program: str, *, seconds: float = SECONDS) -> bool:
    """Whether a Python program ends without an error within `seconds`; it and its children are killed if not."""
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", program],
            cwd=folder,
            env={"PATH": os.defpath},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return process.wait(seconds) == 0
        except subprocess.TimeoutExpired:
            return False
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _valid(program: str, function: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in generated strings
            statements = ast.parse(program).body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    bodies = [s.body for s in statements if isinstance(s, ast.FunctionDef) and s.name == function]
    return any(len(body) > 1 or ast.get_docstring(ast.Module(body, [])) is None for body in bodies)
