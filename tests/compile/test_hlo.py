"""Counts out of compiled HLO text: a stored program, and small ones compiled here against XLA's own."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from argenseg_jax import sharding
from argenseg_jax.compile import hlo

# A loop of 3 over stacked weights on 8 devices in two slices: a layer is gathered over 4, multiplied, summed.
STORED = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%layer (param_0: bf16[3,64,128], param_1: s32[]) -> bf16[1,64,128] {
  %param_0 = bf16[3,64,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = s32[]{:T(128)} parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = bf16[1,64,128]{2,1,0} dynamic-slice(%param_0, %param_1, %zero, %zero), dynamic_slice_sizes={1,64,128}
}

%body (loop: (s32[], bf16[16,256], bf16[3,64,128])) -> (s32[], bf16[16,256], bf16[3,64,128]) {
  %loop = (s32[], bf16[16,256]{1,0}, bf16[3,64,128]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%loop), index=0
  %x = bf16[16,256]{1,0} get-tuple-element(%loop), index=1
  %stack = bf16[3,64,128]{2,1,0} get-tuple-element(%loop), index=2
  %w = bf16[1,64,128]{2,1,0} fusion(%stack, %i), kind=kLoop, calls=%layer
  %start = (bf16[1,64,128]{2,1,0}, bf16[1,256,128]{2,1,0}) all-gather-start(%w), channel_id=1, replica_groups=[2,4]<=[8], dimensions={1}, use_global_device_ids=true
  %whole = bf16[1,256,128]{2,1,0} all-gather-done(%start)
  %matrix = bf16[256,128]{1,0} bitcast(%whole)
  %y = f32[16,128]{1,0} convolution(%x, %matrix), dim_labels=bf_io->bf
  %summed = f32[16,128]{1,0} all-reduce(%y), channel_id=2, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %out = (s32[], bf16[16,256]{1,0}, bf16[3,64,128]{2,1,0}) tuple(%next, %x, %stack)
}

%condition (loop.1: (s32[], bf16[16,256], bf16[3,64,128])) -> pred[] {
  %loop.1 = (s32[], bf16[16,256]{1,0}, bf16[3,64,128]{2,1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%loop.1), index=0
  %limit = s32[] constant(3)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (state: (s32[], bf16[16,256], bf16[3,64,128])) -> (s32[], bf16[16,256], bf16[3,64,128]) {
  %state = (s32[], bf16[16,256]{1,0}, bf16[3,64,128]{2,1,0}) parameter(0)
  ROOT %while = (s32[], bf16[16,256]{1,0}, bf16[3,64,128]{2,1,0}) while(%state), condition=%condition, body=%body
}
"""


def test_a_stored_program():
    counts = hlo.count(STORED, chips_per_slice=4)
    layer, y = 2 * 64 * 128, 4 * 16 * 128
    assert counts.flops == 3 * 2 * 16 * 256 * 128
    assert counts.collectives == {"all-gather": 3 * 3 * layer, "all-reduce": 3 * 2 * y * 7 / 8}
    assert counts.across_slices == 3 * 2 * y * 7 / 8  # the gathers stay inside their slices
    # A layer's slice is read and written, gathered; then the product, its sum and the counter.
    product = 2 * 16 * 256 + 4 * layer + y
    gather = layer + 4 * layer  # the tuple of a -start names its operand a second time
    assert counts.bytes == 3 * (2 * layer + 4 + gather + product + 2 * y + 12)
    noted = STORED.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}')
    assert hlo.count(noted).flops == 5 * 2 * 16 * 256 * 128


def test_fast_memory_is_no_traffic():
    """S(1) lies on the chip: a prefetch reads HBM, and what is used from there costs nothing."""
    text = """%part (p: f32[8,4], q: f32[2,4]) -> (f32[2,4], f32[8,4]) {
  %p = f32[8,4]{1,0} parameter(0)
  %q = f32[2,4]{1,0:S(1)} parameter(1)
  %y = f32[2,4]{1,0} exponential(%q)
  ROOT %both = (f32[2,4]{1,0}, f32[8,4]{1,0}) tuple(%y, %p)
}

ENTRY %main (x: f32[2,4], z: f32[8,4]) -> (f32[2,4], f32[8,4]) {
  %x = f32[2,4]{1,0} parameter(0)
  %z = f32[8,4]{1,0} parameter(1)
  %start = (f32[2,4]{1,0:T(8,128)S(1)}, f32[2,4]{1,0}, u32[]{:S(2)}) copy-start(%x)
  %near = f32[2,4]{1,0:T(8,128)S(1)} copy-done(%start)
  %slicing = ((f32[8,4]{1,0}), f32[1,4]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%z), slice={[0:1], [0:4]}
  %row = f32[1,4]{1,0:S(1)} slice-done(%slicing)
  %square = f32[2,4]{1,0:S(1)} multiply(%near, %near)
  ROOT %out = (f32[2,4]{1,0}, f32[8,4]{1,0}) fusion(%z, %square), kind=kLoop, """
    # The fusion holds z for a collective that is under way: it neither reads nor writes it.
    aliased = text + "output_to_operand_aliasing={{1}: (0, {})}, calls=%part\n}\n"
    prefetched = 4 * (2 * 4 + 4)
    assert hlo.count(aliased).bytes == prefetched + 4 * 2 * 4
    assert hlo.count(text + "calls=%part\n}\n").bytes == prefetched + 4 * 2 * 4 + 2 * 4 * 8 * 4


def test_a_window_over_heads():
    """A product with [D, heads, H] is a convolution on TPUs; its window counts axes by their number."""
    line = (
        "ENTRY %main (x: bf16[2,64,16,1], w: bf16[8,32,16,1]) -> bf16[2,64,8,32] {\n"
        "  %x = bf16[2,64,16,1]{3,2,1,0} parameter(0)\n"
        "  %w = bf16[8,32,16,1]{3,2,1,0} parameter(1)\n"
        "  ROOT %y = bf16[2,64,8,32]{3,2,1,0} convolution(%x, %w), "
        "window={size=1x8 pad=0_0x7_7 rhs_reversal=0x1}, dim_labels=0bf1_1oi0->0b1f\n}\n"
    )
    assert hlo.count(line).flops == 2 * 2 * 64 * 16 * 8 * 32


def test_groups():
    assert hlo.replica_groups("replica_groups={{0,2},{1,3}}, x") == [[0, 2], [1, 3]]
    assert hlo.replica_groups("replica_groups=[2,2]<=[4]") == [[0, 1], [2, 3]]
    assert hlo.replica_groups("replica_groups=[4,2]<=[2,4]T(1,0)") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    axes = "replica_groups=mesh['a'=2,'b'=4] "
    assert hlo.replica_groups(axes + "{'b'}, x") == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert hlo.replica_groups(axes + "{'a'}") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert hlo.replica_groups(axes + "{'a','b'}") == [list(range(8))]
    assert hlo.replica_groups(axes + "{'b':(2)2}") == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_a_collective_in_several_fusions_is_one():
    """Started, carried on and ended beside other work, as TPUs do; twice where a loop runs twice."""
    gather = (
        "%{0} (p: f32[2,4]) -> f32[8,4] {{\n  %p = f32[2,4] parameter(0)\n  ROOT %g.{0} = f32[8,4] "
        "all-gather(%p), channel_id=7, replica_groups=mesh['x'=4] {{'x'}}, dimensions={{0}}\n}}\n\n"
    )
    text = (
        gather.format("one")
        + gather.format("two")
        + """ENTRY %main (x: f32[2,4]) -> f32[8,4] {
  %x = f32[2,4] parameter(0)
  %start = f32[8,4] fusion(%x), kind=kCustom, calls=%one
  ROOT %done = f32[8,4] fusion(%x), kind=kCustom, calls=%two
}
"""
    )
    assert hlo.count(text).collectives == {"all-gather": 3 * 4 * 2 * 4}


@pytest.mark.parametrize("stride, padding, dilation", [(1, 1, 1), (2, 0, 1), (1, 1, 2)])
def test_convolutions_against_xla(stride, padding, dilation):
    """What meets the padding, or the holes of a dilated input, is left out on both sides."""

    def conv(x, k):
        return jax.lax.conv_general_dilated(
            x,
            k,
            (stride, stride),
            [(padding, padding)] * 2,
            lhs_dilation=(dilation, 1),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    compiled = jax.jit(conv).lower(jnp.zeros((2, 9, 8, 3)), jnp.zeros((3, 3, 3, 5))).compile()
    text = compiled.as_text()
    assert "convolution(" in text and hlo.count(text).flops == compiled.cost_analysis()["flops"]


def test_a_scan_is_counted_as_often_as_it_runs():
    """Weights sharded over 4 devices, gathered in every one of 6 layers."""
    mesh = sharding.make_mesh(dict(dcn_data=1, data=1, fsdp=4, tensor=1), jax.devices()[:4])
    place = lambda *spec: NamedSharding(mesh, P(*spec))

    def layers(x, stack):
        def layer(x, w):
            w = jax.lax.with_sharding_constraint(w, place())
            return jnp.tanh(x @ w), None

        return jax.lax.scan(layer, x, stack)[0]

    args = (
        jax.ShapeDtypeStruct((32, 64), jnp.float32, sharding=place("fsdp")),
        jax.ShapeDtypeStruct((6, 64, 64), jnp.float32, sharding=place(None, "fsdp")),
    )
    counts = hlo.count(jax.jit(layers, out_shardings=place("fsdp")).lower(*args).compile().as_text())
    assert counts.flops == pytest.approx(6 * 2 * 8 * 64 * 64)
    assert counts.collectives["all-gather"] == 6 * 4 * 64 * 64 * 3 / 4
