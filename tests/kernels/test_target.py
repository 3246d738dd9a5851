# SPDX-License-Identifier: Apache-2.0
"""What ``--target`` names, and what code for it may use."""

import pytest

from gptq_compile.errors import ConfigError
from gptq_compile.kernels.target import Target


def test_a_cpu_target_has_a_variant_for_each_architecture() -> None:
    target = Target.parse("cpu:x86-64-v3,x86-64-v4+avx512vnni")
    assert target.archs == ("x86-64-v3", "x86-64-v4+avx512vnni")
    assert str(target) == "cpu:x86-64-v3,x86-64-v4+avx512vnni" and Target.parse(str(target)) == target
    assert target.variants == (Target.parse("cpu:x86-64-v3"), Target.parse("cpu:x86-64-v4+avx512vnni"))
    assert Target.parse("cpu").archs[0] == "x86-64-v3"
    assert Target.parse("cuda:sm_80,sm_90").variants == (Target.parse("cuda:sm_80,sm_90"),)


def test_features_are_those_that_all_architectures_have() -> None:
    baseline, vnni = Target.parse("cpu:x86-64-v3,x86-64-v4+avx512vnni").variants
    assert [baseline.has(f) for f in ("avx2", "avx512f", "avx512vnni")] == [True, False, False]
    assert [vnni.has(f) for f in ("avx2", "avx512f", "avx512vnni")] == [True, True, True]
    assert not Target.parse("cpu:x86-64-v4").has("avx512vnni")
    assert not Target.parse("cpu:x86-64-v3,x86-64-v4+avx512vnni").has("avx512f")
    assert Target.parse("cpu:aarch64+dotprod").has("dotprod") and Target.parse("cpu:aarch64").has("neon")
    assert not Target.parse("cpu:aarch64").has("dotprod")
    assert not Target.parse("cuda").has("avx2")


def test_tvm_gets_triple_and_features() -> None:
    arm = Target.parse("cpu:aarch64+dotprod").tvm()
    assert str(arm.attrs["mtriple"]).startswith("aarch64") and "+dotprod" in arm.attrs["mattr"]
    vnni = Target.parse("cpu:x86-64-v4+avx512vnni").tvm()
    assert vnni.attrs["mcpu"] == "x86-64-v4" and list(vnni.attrs["mattr"]) == ["+avx512vnni"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("cpu:x86-64-v3,", "empty name"),
        ("cpu:x86-64-v4+vnni", "Unknown processor feature 'vnni'"),
        ("cpu:x86-64-v3,aarch64", "mixes x86-64 and aarch64"),
        ("tpu", "Unknown target"),
    ],
)
def test_a_bad_target_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        Target.parse(text)
