"""A head ends at once, and says why in one line, when vLLM cannot serve the model so."""

import json

import pytest

from molink.engine.server import parse_flags

from .conftest import MODEL

DESC_ACT = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True, "sym": True}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--gpu-memory-utilization=1.5"], "gpu_memory_utilization: Input should be less than"),
        (["--tensor-parallel-size=7"], "must be divisible by tensor parallel size (7)"),
        (["--api-key=secret"], "--api-key cannot be given here: only on the command line"),
        (
            ["--hf-overrides", json.dumps({"quantization_config": DESC_ACT})],
            "(desc_act=True) is no longer supported",
        ),
    ],
)
def test_before_a_node_is_waited_for(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_flags(str(MODEL), "http.sock", flags)
    assert ended.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("molink serve: error: ")
    assert words in line
