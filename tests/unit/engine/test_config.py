"""A stage runs with the head's values, or not at all; a user's secrets stay on the head."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.config import VllmConfig

from molink.core.errors import AdmissionError, UsageError
from molink.engine.config import engine_flags_of, resolve, stage_config
from molink.engine.server import parse_flags
from molink.wire.to_stage import LoadStage, Resolved

from .conftest import MODEL, MakeConfig

SPECULATION = '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}'


@dataclass(frozen=True)
class Node:
    """A node that is told to load a stage, with flags and devices of its own."""

    resolved: Resolved
    engine_flags: list[str] = field(default_factory=lambda: ["--max-model-len=512"])

    def load(self, *flags: str, tensor_parallel_size: int = 1) -> VllmConfig:
        load = LoadStage(
            stage_index=1,
            nodes=[0, 1],
            partition=[3, 5],
            engine_flags=self.engine_flags,
            resolved=self.resolved,
        )
        return stage_config(
            load,
            model=MODEL,
            node_flags=list(flags),
            tensor_parallel_size=tensor_parallel_size,
        )


@pytest.fixture(scope="module")
def node(head_config: VllmConfig) -> Node:
    return Node(resolve(head_config))


def test_the_heads_values_are_those_of_its_configuration(make_config: MakeConfig) -> None:
    flags = {
        "dtype": "float32",
        "kv_cache_dtype": "auto",
        "seed": 11,
        "max_model_len": 128,
        "max_num_batched_tokens": 640,
        "max_num_seqs": 6,
        "block_size": 32,
        "max_loras": 2,
        "max_lora_rank": 8,
    }
    spelled = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    found = resolve(make_config("--enable-lora", "--no-enable-prefix-caching", *spelled))
    assert found == Resolved(
        quantization=None,
        enable_prefix_caching=False,
        enable_chunked_prefill=True,
        num_speculative_tokens=None,
        **flags,
    )
    speculating = make_config(f"--speculative-config={SPECULATION}")
    assert resolve(speculating).num_speculative_tokens == 3


OTHER_VALUES = [
    ["--dtype", "float32"],
    ["--quantization=fp8"],
    ["--kv-cache-dtype", "fp8"],
    ["--seed=7"],
    ["--max-model-len", "128"],
    ["--max-num-batched-tokens=300"],
    ["--max-num-seqs", "3"],
    ["--block_size=32"],
    ["--no-enable-prefix-caching"],
    ["--no-enable-chunked-prefill"],
    ["--async-scheduling"],
    ["-pp", "3"],
    ["--distributed-executor-backend=uni"],
]


@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.sampled_from(OTHER_VALUES), unique_by=lambda flag: flag[0], max_size=6),
    st.sampled_from([1, 2, 4]),
)
def test_a_node_that_would_choose_other_values_takes_the_heads(
    node: Node, flags: list[list[str]], tensor_parallel_size: int
) -> None:
    own = [part for flag in flags for part in flag]
    config = node.load(*own, tensor_parallel_size=tensor_parallel_size)
    assert resolve(config) == node.resolved
    parallel = config.parallel_config
    assert parallel.pipeline_parallel_size == 2
    assert parallel.tensor_parallel_size == tensor_parallel_size
    assert parallel.distributed_executor_backend == "mp"
    assert not config.scheduler_config.async_scheduling


@pytest.mark.parametrize(
    "values",
    [
        {"dtype": "float32"},
        {"kv_cache_dtype": "fp8"},
        {"seed": 3},
        {"max_model_len": 100},
        {"max_num_batched_tokens": 777},
        {"max_num_seqs": 5},
        {"block_size": 16},
        {"enable_prefix_caching": False},
        {"enable_chunked_prefill": False, "max_num_batched_tokens": 512},
    ],
)
def test_every_value_of_the_heads_is_imposed(node: Node, values: dict[str, Any]) -> None:
    """As from a head with another device, whose defaults differ from this machine's."""
    other = Resolved(**{f: getattr(node.resolved, f) for f in Resolved.__struct_fields__} | values)
    assert resolve(Node(other).load()) == other


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--enable-lora"], "max_loras is None on the head and 1 on this node"),
        (
            [f"--speculative-config={SPECULATION}"],
            "num_speculative_tokens is None on the head and 3 on this node",
        ),
    ],
)
def test_what_cannot_be_imposed_is_refused_with_both_values(
    node: Node, flags: list[str], message: str
) -> None:
    with pytest.raises(AdmissionError, match=f"^{message}$"):
        node.load(*flags)


@pytest.mark.parametrize("flags", [["--no-such-flag"], ["--seed", "x"], ["stray"], ["--api-key=s"]])
def test_flags_that_are_not_the_engines_are_refused(node: Node, flags: list[str]) -> None:
    with pytest.raises(UsageError, match="does not accept the flags"):
        node.load(*flags)


# --- memory for KV on a CPU


def test_a_stage_on_a_cpu_leaves_most_of_the_memory(node: Node) -> None:
    taken = node.load().cache_config.kv_cache_memory_bytes
    assert 0 < taken <= psutil.virtual_memory().total // 8


@pytest.mark.parametrize(
    ("flags", "taken"),
    [(["--kv-cache-memory-bytes=123456789"], 123456789), (["--gpu-memory-utilization=0.2"], None)],
)
def test_the_user_says_how_much_memory_a_stage_takes(
    node: Node, flags: list[str], taken: int | None
) -> None:
    assert node.load(*flags).cache_config.kv_cache_memory_bytes == taken


def test_the_environment_says_how_much_memory_a_stage_takes(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    assert node.load().cache_config.kv_cache_memory_bytes == 1 << 30


# --- which of the user's flags leave the head

HTTP_FLAGS = [
    ["--api-key", "secret"],
    ["--api-key=secret"],
    ["--api_key", "secret"],
    ["--api-key", "secret", "secret-2"],
    ["--port", "8000"],
    ["--ssl-keyfile=/secret.pem"],
    ["--enable-auto-tool-choice"],
    ["--allowed-origins", '["secret"]'],
]
ENGINE_FLAGS = [
    ["--dtype", "float32"],
    ["--max-model-len=8000"],
    ["--max-num-seqs", "4"],
    ["--enforce-eager"],
    ["--no-enable-prefix-caching"],
    ["-tp", "2"],
    ["-tp=2"],
    ["--hf-overrides", '{"a": "--port"}'],
]
in_any_order = st.lists(st.sampled_from(HTTP_FLAGS + ENGINE_FLAGS), max_size=8)


@settings(deadline=None, max_examples=60)
@given(in_any_order)
def test_engine_flags_leave_the_head_and_no_others(flags: list[list[str]]) -> None:
    kept = engine_flags_of([part for flag in flags for part in flag])
    assert kept == [part for flag in flags if flag in ENGINE_FLAGS for part in flag]
    assert not any("secret" in part for part in kept)


@pytest.mark.parametrize(
    ("flags", "sent"),
    [
        (["--max_num_seqs", "4"], ["--max-num-seqs", "4"]),
        (["--load_format=dummy"], ["--load-format=dummy"]),
        (["--enforce_eager"], ["--enforce-eager"]),
        (["-O0"], ["--optimization-level", "0"]),
        (["-O", "0"], ["--optimization-level", "0"]),
        (["--hf-overrides.rope_theta", "4"], ["--hf-overrides", '{"rope_theta": 4}']),
        (["--compilation-config.mode=0"], ["--compilation-config", '{"mode": 0}']),
    ],
)
def test_flags_leave_the_head_in_the_spelling_that_argparse_knows(
    flags: list[str], sent: list[str]
) -> None:
    _, engine_flags = parse_flags(str(MODEL), "http.sock", ["--root_path=secret", *flags])
    assert engine_flags == sent


def test_flags_of_a_file_leave_the_head_without_its_secrets(tmp_path: Path) -> None:
    file = tmp_path / "flags.yaml"
    file.write_text("max-num-seqs: 7\nroot-path: secret\n")
    _, engine_flags = parse_flags(str(MODEL), "http.sock", ["--config", str(file)])
    assert engine_flags == ["--max-num-seqs", "7"]


def test_a_file_of_flags_cannot_contradict_a_pipeline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "flags.yaml"
    file.write_text("async-scheduling: true\n")
    with pytest.raises(SystemExit) as ended:
        parse_flags(str(MODEL), "http.sock", ["--config", str(file)])
    assert ended.value.code == 2
    assert "--async-scheduling cannot be given" in capsys.readouterr().err
