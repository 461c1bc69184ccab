import dataclasses
from typing import Any

import pytest

from picker.errors import ConfigError
from picker.sim.latency import Profile, profile, profiles

CONTRACT_NAMES = {
    "llama-3.1-8b-h100",
    "qwen3-32b-2xh100",
    "llama-3.1-70b-4xh100",
    "qwen3-coder-30b-h200",
    "qwen3-coder-480b-8xh200",
    "deepseek-v3-8xh200",
}


def test_the_names_of_the_contract_exist_and_every_profile_says_where_it_comes_from() -> None:
    assert profiles().keys() >= CONTRACT_NAMES
    for known in profiles().values():
        assert known.source.split(":")[0] in {"published", "fitted", "estimate"}


def test_units_of_the_data_file_become_seconds() -> None:
    qwen = profile("qwen3-32b-2xh100")
    assert (qwen.c0, qwen.c_pf, qwen.c_attn, qwen.c_kv, qwen.c_seq) == pytest.approx((0.018, 50e-6, 2e-9, 39e-9, 20e-6))
    assert (qwen.front_end_s, qwen.front_end_per_token_s) == pytest.approx((0.015, 8e-6))
    assert qwen.num_blocks == 307_328 // 16


def test_step_time_is_the_sum_of_its_parts() -> None:
    p = Profile("p", c0=1.0, c_pf=0.1, c_attn=0.01, c_kv=0.001, c_seq=0.5, kv_tokens=64, source="")
    time = p.step_time(prefill_tokens=10, prefill_work=10 * (20 + 10 / 2), decodes=2, context=300)
    assert time == pytest.approx(1.0 + 0.1 * 10 + 0.01 * 250 + 0.001 * 300 + 0.5 * 2)


@pytest.mark.parametrize(
    ("name", "at_1_ms", "at_32_ms"), [("qwen3-coder-30b-h200", 6, 16), ("qwen3-coder-30b-fp8-h100", 5, 12)]
)
def test_a_mixture_of_experts_reads_more_weights_with_more_sequences(
    name: str, at_1_ms: float, at_32_ms: float
) -> None:
    bare = dataclasses.replace(profile(name), c_seq=0.0)
    times = [1e3 * bare.step_time(prefill_tokens=0, prefill_work=0, decodes=n, context=0) for n in (1, 32)]
    assert times == pytest.approx([at_1_ms, at_32_ms], rel=0.01)


def test_front_end_grows_with_the_prompt() -> None:
    assert profile("qwen3-32b-2xh100").front_end(10_000) == pytest.approx(0.015 + 0.08)


def test_a_faster_pod_is_faster_in_every_part() -> None:
    p = profile("qwen3-coder-30b-h200")
    slow, fast = (
        pod.step_time(prefill_tokens=100, prefill_work=5000.0, decodes=7, context=900) for pod in (p, p.scaled(2.0))
    )
    assert fast == pytest.approx(slow / 2)
    assert p.scaled(2.0).kv_tokens == p.kv_tokens


def test_an_unknown_profile_names_near_ones() -> None:
    with pytest.raises(ConfigError, match=r"no model profile 'qwen3-32b'.*qwen3-32b-2xh100"):
        profile("qwen3-32b")


@pytest.mark.parametrize("name", ["kv_tokens", "block_size", "max_num_seqs", "max_num_batched_tokens", "max_model_len"])
def test_a_limit_of_nothing_is_refused(name: str) -> None:
    nothing: dict[str, Any] = {name: 0}
    with pytest.raises(ConfigError, match=f"{name} must be at least 1, not 0"):
        dataclasses.replace(profile("llama-3.1-8b-h100"), **nothing)


def test_limits_that_vllm_refuses_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_num_batched_tokens"):
        dataclasses.replace(profile("qwen3-32b-2xh100"), max_num_batched_tokens=100)
    with pytest.raises(ConfigError, match="two blocks"):
        dataclasses.replace(profile("qwen3-32b-2xh100"), kv_tokens=16)
