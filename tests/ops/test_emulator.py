"""The emulator runs correct Metal kernels as Metal would, and says what is wrong with the others."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests.support.emulator import Emulated, EmulationError, _build


def run(
    source: str,
    *inputs: mx.array,
    header: str = "",
    shape: tuple[int, ...] = (100,),
    dtype: mx.Dtype = mx.float32,
    threads: int = 100,
    threadgroup: int = 64,
    template: tuple[tuple[str, Any], ...] = (),
) -> mx.array:
    """Run a kernel of inputs `a`, `b`, ... and one output `out`, for each thread `i` of the grid, `l` of its group."""
    kernel = mx.fast.metal_kernel(
        name="test",
        input_names=list("abc"[: len(inputs)]),
        output_names=["out"],
        source=f"uint i = thread_position_in_grid.x, l = thread_index_in_threadgroup;\n{source}",
        header=header,
    )
    (out,) = Emulated(kernel)(
        inputs=inputs,
        output_shapes=[shape],
        output_dtypes=[dtype],
        grid=(threads, 1, 1),
        threadgroup=(threadgroup, 1, 1),
        template=template,
    )
    assert (out.shape, out.dtype) == (shape, dtype)
    return out


def same(a: mx.array, b: mx.array) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(mx.array_equal(a, b, equal_nan=True))


a = mx.random.normal((100,), key=mx.random.key(0))


def test_a_grid_that_is_no_multiple_of_the_threadgroup() -> None:
    assert same(run("out[i] = 2 * a[i] + threads_per_threadgroup.x;", a), 2 * a + mx.where(mx.arange(100) < 64, 64, 36))


def test_positions_in_three_dimensions() -> None:
    kernel = mx.fast.metal_kernel(
        name="positions",
        input_names=[],
        output_names=["out", "group"],
        source="""
        uint3 p = thread_position_in_grid, n = threads_per_grid;
        uint at = (p.z * n.y + p.y) * n.x + p.x;
        uint3 g = threadgroup_position_in_grid, t = thread_position_in_threadgroup, m = threads_per_threadgroup;
        out[at] = thread_index_in_threadgroup == (t.z * m.y + t.y) * m.x + t.x ? at : 0;
        group[at] = 100 * g.z + 10 * g.y + g.x;
        """,
    )
    out, group = Emulated(kernel)(
        inputs=[],
        output_shapes=[(3, 4, 5), (3, 4, 5)],
        output_dtypes=[mx.uint32, mx.uint32],
        grid=(5, 4, 3),
        threadgroup=(2, 4, 2),
    )
    assert same(out, mx.arange(60, dtype=mx.uint32).reshape(3, 4, 5))
    z, y, x = np.indices((3, 4, 5))
    assert np.array_equal(group, 100 * (z // 2) + 10 * (y // 4) + x // 2)


def test_sum_in_threadgroup_memory() -> None:
    source = """
        threadgroup float sums[64], scale[1]; threadgroup int users;
        scale[0] = 1;
        sums[l] = a[i];
        if (l == 0) users = 64;
        for (uint half_ = 32; half_ > 0; half_ /= 2) {
          threadgroup_barrier(mem_flags::mem_threadgroup);
          threadgroup float* own = sums + l;
          if (l < half_) *own += own[half_];
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (l == 1) out[threadgroup_position_in_grid.x] = sums[0] / users * scale[0];
    """
    values = mx.arange(256, dtype=mx.float32)
    assert run(source, values, threads=256, shape=(4,)).tolist() == values.reshape(4, 64).mean(1).tolist()


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("simd_sum(a[i])", [496.0] * 32 + [1520.0] * 32),
        ("simd_max(a[i])", [31.0] * 32 + [63.0] * 32),
        ("simd_min(a[i])", [0.0] * 32 + [32.0] * 32),
        ("simd_broadcast(a[i], 5)", [5.0] * 32 + [37.0] * 32),
        ("simd_shuffle(a[i], 31 - thread_index_in_simdgroup)", [*range(31, -1, -1), *range(63, 31, -1)]),
        ("simd_shuffle_xor(a[i], 1)", [i ^ 1 for i in range(64)]),
        ("simd_shuffle_down(a[i], 8)", [i + 8 if i % 32 < 24 else i for i in range(64)]),
        ("simd_sum(int(i)) + simdgroup_index_in_threadgroup", [496.0] * 32 + [1521.0] * 32),
    ],
)
def test_simd_operations(call: str, expected: list[float]) -> None:
    values = mx.arange(64, dtype=mx.float32)
    assert run(f"out[i] = {call};", values, threads=64, shape=(64,)).tolist() == expected


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_small_floats_round_as_those_of_mlx(dtype: mx.Dtype) -> None:
    special = [0.0, -0.0, 1e-7, 6e-8, 65520.0, 1e38, 3.4e38, float("inf"), float("nan"), 1.00390625, 1.01171875]
    values = mx.concatenate([mx.array(special), 100 * a])
    count = values.size
    rounded = run("out[i] = T(a[i]);", values, shape=(count,), threads=count, dtype=dtype, template=(("T", dtype),))
    assert same(rounded, values.astype(dtype))
    # Every operation rounds.
    x, y = rounded, rounded[::-1]
    z = run("out[i] = a[i] * b[i] + a[i];", x, y, shape=(count,), threads=count, dtype=dtype)
    assert same(z, x * y + x)
    assert same(run("out[i] = float(a[i]);", x, shape=(count,), threads=count), x.astype(mx.float32))


def test_vectors_and_bits() -> None:
    words = mx.random.randint(0, 2**31 - 1, (8,), key=mx.random.key(1)).astype(mx.uint32)
    source = """
        uint4 w = ((const device uint4*)a)[i];
        half2 h = as_type<half2>(w[3]);
        float d = dot(float2(3), float2(1, 2));
        float4 v(w.x & 1, extract_bits(w.y, 4, 5), insert_bits(w.z, 3u, 30, 2) >> 30, d);
        ((device float4*)out)[i] = 0.5 * v;
        ((device half2*)out)[8 + i] = h;
    """
    out = run(source, mx.concatenate([words, words]), threads=2, shape=(10,))
    w = np.array(words).reshape(2, 4)
    expected = 0.5 * np.stack([w[:, 0] & 1, w[:, 1] >> 4 & 31, [3, 3], [9, 9]], axis=1)
    assert np.array_equal(np.array(out[:8]).reshape(2, 4), expected)
    assert np.array_equal(np.array(out[8:]).view(np.uint32), w[:, 3])


def test_small_inputs_scalars_shapes_and_headers() -> None:
    # Not contiguous, and in constant memory.
    matrix = mx.arange(6).reshape(2, 3).T
    source = "out[i] = K * helper(a, i) + b + a_shape[0] * 100 + a_strides[0] * 1000 + a_ndim * 10000;"
    header = (
        "#include <metal_stdlib>\nusing namespace metal;\nint helper(const constant int* p, uint i) { return p[i]; }\n"
    )
    out = run(source, matrix, mx.array(0.5), header=header, threads=6, shape=(6,), template=(("K", 2),))
    assert same(out, matrix.reshape(-1) * 2 + mx.array(22300.5))


NEIGHBOUR = """
    threadgroup float shared_[64];
    shared_[l] = a[i];
    {barrier}
    out[i] = shared_[(l + {step}) % 64];
"""


@pytest.mark.parametrize("step", [1, 63], ids=["higher", "lower"])
@pytest.mark.parametrize("kind", ["threadgroup", "simdgroup", None])
def test_neighbours_need_a_barrier(step: int, kind: str | None) -> None:
    barrier = f"{kind}_barrier(mem_flags::mem_threadgroup);" if kind else ""
    source = NEIGHBOUR.format(barrier=barrier, step=step)
    values = mx.arange(64, dtype=mx.float32)
    if kind == "threadgroup":
        assert same(run(source, values, threads=64, shape=(64,)), mx.roll(values, -step))
    else:
        # A barrier of the simdgroup does not order it and the other one.
        with pytest.raises(EmulationError, match=r"output out: element \d+ .*: a barrier is missing"):
            run(source, values, threads=64, shape=(64,))


@pytest.mark.parametrize("step", [1, 31], ids=["higher", "lower"])
def test_memory_that_is_used_again_needs_a_second_barrier(step: int) -> None:
    source = f"""
        threadgroup float shared_[32];
        float sum = 0;
        for (int k = 0; k < 3; k++) {{
          shared_[l] = k * a[i];
          threadgroup_barrier(mem_flags::mem_threadgroup);
          sum += shared_[(l + {step}) % 32];
        }}
        out[i] = sum;
    """
    with pytest.raises(EmulationError, match="a barrier is missing"):
        run(source, mx.arange(32, dtype=mx.float32), threads=32, shape=(32,))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("out[i] = a[i + 1];", r"thread \(99, 0, 0\) is out of bounds: a\[100\], and it has 100 elements"),
        ("out[i] = a[int(i) - 1];", r"thread \(0, 0, 0\) is out of bounds: a\[-1\], and it has 100 elements"),
        ("out[i + 1] = a[i];", r"is out of bounds: out\[100\], and it has 100 elements"),
        ("out[int(i) - 2] = a[i];", r"is out of bounds: out\[-[12]\], and it has 100 elements"),
        ("out[i] = a[i + 100000000];", r"is out of bounds, and far from every buffer"),
        ("if (i != 7) out[i] = a[i];", r"^output out: element 7 was never written$"),
        ("threadgroup float f[64]; out[i] = f[l];", r"element 0 depends on memory that was never written"),
        ("((device float*)a)[i] = 0; out[i] = 0;", r"thread \(0, 0, 0\) writes to the input a\[0\]"),
        ("threadgroup float f[64]; f[l + 1] = 0; out[i] = f[0];", r"index 64 out of bounds for type 'float \[64\]'"),
        ("threadgroup float f[8193]; f[0] = 0; out[i] = f[0];", r"more than 32768 bytes of threadgroup memory"),
        ("out[i] = ((const device float2*)(a + 1))[0].x;", r"misaligned address"),
        ("out[i] = 1 << (32 + l);", r"shift exponent 32 is too large"),
        (
            "out[i] = l != 3 ? simd_sum(a[i]) : 0;",
            r"thread 0 of a threadgroup waits in simd_sum while thread 3 has ended",
        ),
        (
            "out[i] = l < 3 ? simd_sum(a[i]) :\n simd_max(a[i]);",
            r"thread 0 .* waits in simd_sum while thread 3 waits in .*max",
        ),
        # Of the last simdgroup.
        ("out[i] = simd_shuffle(a[i], 4);", r"simd_shuffle reads lane 4 of 4"),
        (
            "if (l > 40) threadgroup_barrier(mem_flags::mem_none);\nout[i] = 0;",
            r"thread 41 of a threadgroup waits in .* while thread 0 has",
        ),
        ("if (l == 9) threadgroup_barrier(mem_flags::mem_none); out[i] = simd_sum(a[i]);", r"waits in another"),
        ("out[i] = undeclared;", r"error: .*undeclared.* -- out\[i\] = undeclared;$"),
        ("bfloat f = a[i]; out[i] = f;", r"error: .*bfloat"),
        ("double f = a[i]; out[i] = f;", r"error: .*double_is_no_type_of_Metal"),
        ("float f[10000]; for (int k = 0; k < 10000; k++) f[k] = a[(i + k) % 100]; out[i] = f[l * 99];", r"frame size"),
    ],
)
def test_faults(source: str, message: str) -> None:
    with pytest.raises(EmulationError, match=message) as error:
        run(source, a)
    assert "\n" not in str(error.value)


def test_a_kernel_that_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.support.emulator.TIMEOUT", 1)
    with pytest.raises(EmulationError, match="the kernel ran for more than 1 seconds"):
        run("while (true) simdgroup_barrier(mem_flags::mem_none);", a)


def test_threadgroups_do_not_wait_for_each_other() -> None:
    with pytest.raises(EmulationError, match="depends on the order in which threads run"):
        run("out[i] = i < 64 ? a[i] : out[i - 64];", a)


def test_nothing_is_compiled_twice() -> None:
    run("out[i] = 3 * a[i];", a)
    before = _build.cache_info().misses
    run("out[i] = 3 * a[i];", a + 1)
    assert _build.cache_info().misses == before
