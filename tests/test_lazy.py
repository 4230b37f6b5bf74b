"""What needs no model imports neither torch nor transformers."""

from __future__ import annotations

import subprocess
import sys

import processes
import pytest

HEAVY = "import sys; heavy = sorted({'torch', 'transformers'} & set(sys.modules)); assert not heavy, heavy"


@pytest.mark.parametrize(
    "code",
    [
        "import dynamo_lm; dynamo_lm.__version__; dir(dynamo_lm)",
        "from dynamo_lm import InputError",
        "from dynamo_lm.cli.main import main; assert main(['--help']) == 0",
        "from dynamo_lm.cli.main import main; assert main(['--version']) == 0",
        "from dynamo_lm.cli.main import main; assert main(['train', '--help']) == 0",
        "from dynamo_lm.cli.main import main; assert main(['eval', 'completion', '--help']) == 0",
    ],
)
def test_neither_torch_nor_transformers_is_imported(code):
    done = subprocess.run([sys.executable, "-c", f"{code}\n{HEAVY}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def first_use() -> None:
    assert "dynamo_lm" not in sys.modules
    from transformers import AutoConfig, AutoModelForCausalLM

    from dynamo_lm import DynaMoConfig

    assert type(AutoConfig.for_model("dynamo_lm")) is DynaMoConfig
    assert DynaMoConfig in AutoModelForCausalLM._model_mapping


def test_the_first_use_of_a_name_registers_the_model_with_transformers(tmp_path):
    process = processes.start(first_use, stdout=tmp_path / "said", stderr=tmp_path / "said")
    process.join()
    assert process.exitcode == 0, (tmp_path / "said").read_text()


def test_an_unknown_name_is_an_attribute_error():
    import dynamo_lm

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dynamo_lm.nothing  # noqa: B018


def test_the_version_is_printed(capsys):
    import dynamo_lm
    from dynamo_lm.cli.main import main

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dynamo-lm {dynamo_lm.__version__}\n"
