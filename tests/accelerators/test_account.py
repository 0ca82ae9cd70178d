"""What an HLO module costs, against numbers worked out by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from prism_jax.accelerators import account, targets
from prism_jax.accelerators.account import Cost

H100 = targets.DEVICES["h100"]

# A loop whose count is unknown, with a teacher's conditional, a library's calls and a small loop.
GPU = """HloModule jit_on_lane, is_scheduled=true

%c (c.2: (s32[], s32[])) -> pred[] {
  %c.2 = (s32[], s32[]) parameter(0)
  %done = s32[] get-tuple-element(%c.2), index=0
  %count = s32[] get-tuple-element(%c.2), index=1
  ROOT %more = pred[] compare(%done, %count), direction=LT
}

%fused (p.0: f32[8,4], p.1: f32[4,16]) -> f32[8,16] {
  %p.0 = f32[8,4]{1,0} parameter(0)
  %p.1 = f32[4,16]{1,0} parameter(1)
  ROOT %dot.1 = f32[8,16]{1,0} dot(%p.0, %p.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%read (a.0: (f32[8,4], f32[4,16])) -> (f32[8,16]) {
  %a.0 = (f32[8,4]{1,0}, f32[4,16]{1,0}) parameter(0)
  %x.0 = f32[8,4]{1,0} get-tuple-element(%a.0), index=0
  %w.0 = f32[4,16]{1,0} get-tuple-element(%a.0), index=1
  %y.0 = f32[8,16]{1,0} fusion(%x.0, %w.0), kind=kCustom, calls=%fused, metadata={op_name="jit(on_lane)/while/body/cond/branch_1_fun/teacher/second/dot_general"}
  ROOT %t.0 = (f32[8,16]{1,0}) tuple(%y.0)
}

%not_read (b.0: (f32[8,16])) -> (f32[8,16]) {
  ROOT %b.0 = (f32[8,16]{1,0}) parameter(0)
}

%inner (c.0: (s32[], f32[8])) -> (s32[], f32[8]) {
  %c.0 = (s32[], f32[8]{0}) parameter(0)
  %v.0 = f32[8]{0} get-tuple-element(%c.0), index=1
  %n.0 = f32[8]{0} negate(%v.0)
  ROOT %t.1 = (s32[], f32[8]{0}) tuple(%v.0, %n.0)
}

%body (d.0: (s32[], f32[2,6,6,3], f32[3,3,3,5], pred[])) -> (s32[]) {
  %d.0 = (s32[], f32[2,6,6,3]{3,2,1,0}, f32[3,3,3,5]{3,2,1,0}, pred[]) parameter(0)
  %image = f32[2,6,6,3]{3,2,1,0} get-tuple-element(%d.0), index=1
  %kernel = f32[3,3,3,5]{3,2,1,0} get-tuple-element(%d.0), index=2
  %cudnn-conv.1 = (f32[2,4,4,5]{3,2,1,0}, u8[1000]{0}) custom-call(%image, %kernel), window={size=3x3}, dim_labels=b01f_01io->b01f, custom_call_target="__cudnn$convForward", backend_config={}
  %map = f32[2,4,4,5]{3,2,1,0} get-tuple-element(%cudnn-conv.1), index=0
  %half = bf16[2,4,4,5]{3,2,1,0} fusion(%map), kind=kLoop, calls=%inner
  %conditional.1 = (f32[8,16]{1,0}) conditional(%flag, %one, %two), true_computation=%read, false_computation=%not_read, metadata={op_name="jit(on_lane)/while/body/cond"}
  %while.2 = (s32[], f32[8]{0}) while(%init), condition=%c, body=%inner, backend_config={"known_trip_count":{"n":"10"}}
  ROOT %t.2 = (s32[]) tuple(%d.0)
}

ENTRY %main (e.0: s32[]) -> (s32[]) {
  %e.0 = s32[] parameter(0)
  %before = f32[1000]{0} broadcast(%e.0)
  %all-reduce.1 = f32[] all-reduce(%before), metadata={op_name="jit(f)/loss/psum"}
  ROOT %while.1 = (s32[]) while(%e.0), condition=%c, body=%body
}
"""  # noqa: E501

TPU = """HloModule jit_on_lane

%c (c.2: (s32[], s32[])) -> pred[] {
  %c.2 = (s32[], s32[]) parameter(0)
  %done = s32[] get-tuple-element(%c.2), index=0
  %count = s32[] get-tuple-element(%c.2), index=1
  ROOT %more = pred[] compare(%done, %count), direction=LT
}

%ten (i: (s32[])) -> pred[] {
  %ten.0 = s32[]{:T(128)} constant(10)
  %i = (s32[]{:T(128)}) parameter(0)
  %now = s32[]{:T(128)} get-tuple-element(%i), index=0
  ROOT %lt = pred[]{:T(512)} compare(%now, %ten.0), direction=LT
}

%small (s: (s32[])) -> (s32[]) {
  %s = (s32[]) parameter(0)
  ROOT %u = (s32[]) fusion(%s), backend_config={"window_config":{"estimated_cycles":"3"}}
}

%body.1 (p: (s32[])) -> (s32[]) {
  %p = (s32[]) parameter(0)
  %a = f32[8]{0:T(128)S(1)} negate(%p), backend_config={"window_config":{"estimated_cycles":"40"}}
  %b = f32[8]{0:T(128)} copy(%a), backend_config={"window_config":{"estimated_cycles":"2"}}
  %d = (s32[]) while(%p), condition=%ten, body=%small
  %c.1 = (f32[]{:T(128)}) conditional(%b, %a), branch_computations={%none, %some}
  ROOT %t = (s32[]) tuple(%p)
}

%none (q: (s32[])) -> (f32[]) {
  %q = (s32[]) parameter(0)
  ROOT %z = f32[] copy(%q), backend_config={"window_config":{"estimated_cycles":"1"}}
}

%some (q.1: (s32[])) -> (f32[]) {
  %q.1 = (s32[]) parameter(0)
  ROOT %z.1 = f32[] fusion(%q.1), metadata={op_name="jit(f)/cond/teacher/net/transpose(jvp(ResNet))/add"}, backend_config={"window_config":{"estimated_cycles":"1000"}}
}

ENTRY %main (e: s32[]) -> (s32[]) {
  %e = s32[] parameter(0)
  ROOT %w = (s32[]) while(%e), condition=%c, body=%body.1
}
"""  # noqa: E501


def test_a_gpu_iteration_by_hand():
    found = account.account(GPU, H100)
    convolution = 4 * (2 * 6 * 6 * 3 + 3 * 3 * 3 * 5 + 2 * 4 * 4 * 5)  # not the workspace
    rounding = (4 + 2) * 2 * 4 * 4 * 5
    small_loop = 10 * 2 * 4 * 8
    assert found.always.bytes == convolution + rounding + small_loop
    assert found.always.flops == 2 * (2 * 4 * 4) * (3 * 3) * 3 * 5
    assert found.always.launches == 2 + 10
    assert found.always.seconds == pytest.approx(found.always.bytes / 3.35e12)
    read = found.teachers["second"]
    assert list(found.teachers) == ["second"]
    assert (read.bytes, read.flops) == (4 * (8 * 4 + 4 * 16 + 8 * 16), 2 * 8 * 16 * 4)
    assert found.mean({"second": 0.5}) == found.always + read * 0.5
    assert found.mean({}) == found.always + read


def test_a_tpu_iteration_by_hand():
    found = account.account(TPU, targets.DEVICES["v5e"])
    assert found.always.cycles == 40 + 2 + 10 * 3
    assert found.teachers["net"].cycles == 1000  # the branch that reads, not the other
    assert found.mean({"net": 0.25}).cycles == 72 + 250
    assert found.always.seconds == 0


def test_a_tpu_program_without_the_engine_s_loop_is_counted_whole():
    """A sampler's loop, whose steps are known, is no iteration: it is all of it."""
    whole = TPU.replace("condition=%c,", "condition=%ten,")
    found = account.account(whole, targets.DEVICES["v5e"])
    assert found.mean({}).cycles == 10 * (72 + 1000)
    # The twin: a counter that is not held against a constant from below says nothing.
    other = whole.replace("direction=LT", "direction=NE")
    assert account.account(other, targets.DEVICES["v5e"]).mean({}).cycles == 40 + 2 + 3 + 1000


def test_the_rate_is_that_of_the_type_and_the_precision():
    line = (
        "  ROOT %d = {t}[4096,4096]{{1,0}} dot(%a, %b), lhs_contracting_dims={{1}}, "
        "rhs_contracting_dims={{0}}{more}\n"
    )
    flops = 2 * 4096**3

    def seconds(kind: str, more: str = "") -> float:
        a, b = (f"  %{n} = {kind}[4096,4096]{{1,0}} parameter(0)\n" for n in "ab")
        text = f"ENTRY %m (a: {kind}[]) -> {kind}[] {{\n{a}{b}{line.format(t=kind, more=more)}}}\n"
        return account.account(text, H100).always.seconds

    assert seconds("bf16") == pytest.approx(flops / 989e12)
    assert seconds("f32") == pytest.approx(flops / 494.7e12)
    assert seconds("f32", ", operand_precision={highest,highest}") == pytest.approx(flops / 67e12)
    three = seconds("f32", ", algorithm=dot_bf16_bf16_f32_x3")
    assert three == pytest.approx(3 * flops / 989e12)


def test_what_is_multiplied_says_the_rate_not_the_result():
    """Scores of attention: bfloat16 in, float32 out."""
    text = """ENTRY %m (a: bf16[], b: bf16[]) -> f32[] {
  %a = bf16[4096,4096]{1,0} parameter(0)
  %b = bf16[4096,4096]{1,0} parameter(1)
  ROOT %d = f32[4096,4096]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
    assert account.account(text, H100).always.seconds == pytest.approx(2 * 4096**3 / 989e12)


def test_only_the_engine_has_a_loop_that_stands_for_all():
    whole = account.account(TPU, targets.DEVICES["v5e"], whole=True)
    assert whole.mean({}).cycles == 72 + 1000
    more = TPU.replace("  ROOT %w = ", "  %before = f32[8]{0} copy(%e), backend_config="
                       '{"estimated_cycles":"5"}\n  ROOT %w = ')  # fmt: skip
    assert account.account(more, targets.DEVICES["v5e"], whole=True).mean({}).cycles == 1077
    assert account.account(more, targets.DEVICES["v5e"]).mean({}).cycles == 1072


@pytest.mark.parametrize(
    "call",
    [  # of one 3x3 convolution, (2, 6, 6, 3) to (2, 4, 4, 5), whichever of the three is the result
        "f32[2,6,6,3]{3,2,1,0} custom-call(%y, %w), target=__cudnn$convBackwardInput",
        "f32[3,3,3,5]{3,2,1,0} custom-call(%x, %y), target=__cudnn$convBackwardFilter",
        "f32[2,4,4,5]{3,2,1,0} custom-call(%x, %w), target=__cudnn$convForward",
    ],
)
def test_gradients_of_a_convolution_count_as_it_does(call):
    values = "x = f32[2,6,6,3]", "w = f32[3,3,3,5]", "y = f32[2,4,4,5]"
    parameters = "".join(f"  %{v}{{3,2,1,0}} parameter(0)\n" for v in values)
    text = f"ENTRY %m (x: f32[]) -> f32[] {{\n{parameters}  ROOT %r = {call}, "
    text += "dim_labels=b01f_01io->b01f\n}\n"
    flops = account.account(text, H100).always.flops
    assert flops == 2 * (2 * 4 * 4) * (3 * 3) * 3 * 5


def test_collectives_are_named_with_their_place():
    assert account.collectives(GPU) == ["all-reduce in jit(f)/loss/psum"]
    assert account.collectives(TPU) == []


def test_a_program_that_this_jax_compiles_is_read():
    """The format is XLA's: bytes and FLOP of a product, by the CPU's compiler."""
    a, b = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((32, 64), (64, 16)))
    text = jax.jit(jnp.dot).lower(a, b).compile().as_text()
    found = account.account(text).always
    assert found.flops == 2 * 32 * 64 * 16
    assert found.bytes == 4 * (32 * 64 + 64 * 16 + 32 * 16)


def test_costs_add_up():
    one = Cost(1, 2.0, 3.0, 4.0, 5.0)
    assert one + one == one * 2 == Cost(2, 4.0, 6.0, 8.0, 10.0)
