"""Bytes and exchanges, read from texts whose answers can be counted by hand."""

import pytest

from mistral_eqx.plan import Exchange
from mistral_eqx.plan.hlo import Program, written


# Memory on the chip is that of a layout with S(1); the rest is the device's main memory.
TEXT = """HloModule step, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%update (cache: bf16[4,100], row: bf16[4,1], at: s32[]) -> bf16[4,100] {
  %cache = bf16[4,100]{1,0} parameter(0)
  %row = bf16[4,1]{1,0} parameter(1)
  %at = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %updated = bf16[4,100]{1,0} dynamic-update-slice(%cache, %row, %zero, %at)
}

%look_up (table: f32[1000,10], ids: s32[3]) -> (f32[3,10], f32[3,10]) {
  %table = f32[1000,10]{1,0} parameter(0)
  %flat = f32[1000,10]{1,0} bitcast(%table)
  %ids = s32[3]{0} parameter(1)
  %rows = f32[3,10]{1,0} gather(%flat, %ids), offset_dims={1}
  %twice = f32[3,10]{1,0} add(%rows, %rows)
  ROOT %both = (f32[3,10]{1,0}, f32[3,10]{1,0}) tuple(%rows, %twice)
}

%body (carry: (bf16[4,100], f32[1000,10], s32[])) -> (bf16[4,100], f32[1000,10], s32[]) {
  %carry = (bf16[4,100]{1,0}, f32[1000,10]{1,0:T(8,128)}, s32[]) parameter(0)
  %cache = bf16[4,100]{1,0} get-tuple-element(%carry), index=0
  %table = f32[1000,10]{1,0:T(8,128)} get-tuple-element(%carry), index=1
  %at = s32[] get-tuple-element(%carry), index=2
  %ids = s32[3]{0:T(128)S(1)} iota(), iota_dimension=0
  %found = (f32[3,10]{1,0}, /*index=1*/f32[3,10]{1,0:S(1)}) fusion(%table, %ids), kind=kLoop, calls=%look_up
  %rows = f32[3,10]{1,0} get-tuple-element(%found), index=0
  %sum = f32[3,10]{1,0:S(1)} all-reduce(%rows), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %small = f32[3]{0:S(1)} all-reduce(%ids), channel_id=2, replica_groups=[2,4]<=[8], to_apply=%add
  %parts = f32[12,10]{1,0:S(1)} all-gather(%sum), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %alone = f32[3,10]{1,0:S(1)} all-reduce(%sum), channel_id=4, replica_groups={{0},{1},{2},{3}}, to_apply=%add
  %row = bf16[4,1]{1,0:S(1)} custom-call(%parts), custom_call_target="row"
  %written = bf16[4,100]{1,0} fusion(%cache, %row, %at), kind=kLoop, calls=%update
  %fetched = (bf16[4,100]{1,0:S(1)}, bf16[4,100]{1,0}, u32[]{:S(2)}) copy-start(%written)
  %here = bf16[4,100]{1,0:S(1)} copy-done(%fetched)
  %sliced = ((f32[1000,10]{1,0}), f32[100,10]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%table), slice={[0:100], [0:10]}
  ROOT %next = (bf16[4,100]{1,0}, f32[1000,10]{1,0}, s32[]) tuple(%written, %table, %at)
}

%condition (carry: (bf16[4,100], f32[1000,10], s32[])) -> pred[] {
  %carry = (bf16[4,100]{1,0}, f32[1000,10]{1,0}, s32[]) parameter(0)
  ROOT %go = pred[] constant(true)
}

ENTRY %main (cache: bf16[4,100], table: f32[1000,10]) -> bf16[4,100] {
  %cache = bf16[4,100]{1,0} parameter(0)
  %table = f32[1000,10]{1,0} parameter(1)
  %start = s32[] constant(0)
  %turned = f32[1000,10]{0,1} copy(%table)
  %carry = (bf16[4,100]{1,0}, f32[1000,10]{1,0}, s32[]) tuple(%cache, %turned, %start)
  %loop = (bf16[4,100]{1,0}, f32[1000,10]{1,0}, s32[]) while(%carry), condition=%condition, body=%body
  ROOT %out = bf16[4,100]{1,0} get-tuple-element(%loop), index=0
}
"""


def test_only_what_is_in_main_memory_and_moved_counts():
    program = Program(TEXT)
    assert program.loop_body() == "body"
    looked_up = 3 * 10 * 4 + 3 * 10 * 4  # rows of the table, and the result that is not on the chip
    reduced = 2 * 3 * 10 * 4
    updated = 4 * 1 * 2 + 4  # the new column alone, and its index
    fetched, sliced = 4 * 100 * 2, 100 * 10 * 4
    turn = looked_up + reduced + updated + fetched + sliced
    assert program.traffic("body") == turn
    assert program.traffic(program.entry) == turn + 2 * 1000 * 10 * 4


def test_a_loop_counts_as_often_as_it_says():
    text = TEXT.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}')
    program = Program(text)
    assert program.traffic(program.entry) == 5 * program.traffic("body") + 2 * 1000 * 10 * 4
    assert [one.count for one in program.exchanges(program.entry)] == [10, 5]


def test_exchanges_are_put_together_by_kind_and_group():
    program = Program(TEXT)
    # One device exchanges nothing.
    expected = [Exchange("all_reduce", 4, 2, 120 + 12), Exchange("all_gather", 4, 1, 120)]
    assert program.exchanges("body") == program.exchanges(program.entry) == expected


def test_exchanges_as_they_are_written():
    text = """
    %1 = "stablehlo.all_reduce"(%0) <{channel_handle = #stablehlo.channel_handle<handle = 1, type = 1>,
      replica_groups = dense<[[0, 1], [2, 3]]> : tensor<2x2xi64>, use_global_device_ids}> ({
    ^bb0(%a: tensor<bf16>, %b: tensor<bf16>):
      %s = stablehlo.add %a, %b : tensor<bf16>
      stablehlo.return %s : tensor<bf16>
    }) : (tensor<8x1x40xbf16>) -> tensor<8x1x40xbf16>
    %2 = "stablehlo.all_gather"(%1) <{all_gather_dim = 1 : i64,
      replica_groups = dense<0> : tensor<1x4xi64>}> : (tensor<3x5xf32>) -> tensor<3x20xf32>
    %3 = "stablehlo.all_reduce"(%1) <{replica_groups = dense<[[0, 2], [1, 3]]> : tensor<2x2xi64>}> ({
    ^bb0(%a: tensor<i32>, %b: tensor<i32>):
      stablehlo.return %a : tensor<i32>
    }) : (tensor<7xi32>) -> tensor<7xi32>
    """
    assert written(text) == [Exchange("all_reduce", 2, 2, 640 + 28), Exchange("all_gather", 4, 1, 60)]
    assert written("%1 = stablehlo.add %0, %0 : tensor<f32>") == []


def test_a_program_of_two_loops_has_no_loop_of_its_own():
    twice = TEXT.replace("  ROOT %out", "  %again = (bf16[4,100]{1,0}) while(%carry), body=%body\n  ROOT %out")
    with pytest.raises(ValueError, match="too many values"):
        Program(twice).loop_body()
