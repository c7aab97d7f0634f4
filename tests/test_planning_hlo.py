"""Bytes and exchanges, read from texts whose answers can be counted by hand."""

import pytest

from mistral_eqx.planning import Exchange
from mistral_eqx.planning.hlo import Program


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


@pytest.mark.parametrize(
    ("groups", "devices"),
    [
        ("{{0,1,2,3,4,5,6,7}}", 8),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['a'=4,'b x'=2] {'b x'}", 2),
        ("mesh['a'=4,'b x'=2] {'b x','a'}", 8),
        ("mesh['a'=4,'b'=2] {'a':(2)2,'b'}", 4),
        ("mesh['a'=4,'b'=2] {'a':(1)2}", 2),
    ],
)
def test_each_form_of_groups_tells_how_many_devices_exchange(groups, devices):
    text = f"""
ENTRY %main (x: f32[6]) -> f32[6] {{
  %x = f32[6]{{0}} parameter(0)
  ROOT %sum = f32[6]{{0}} all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%add
}}
"""
    assert Program(text).exchanges("main") == [Exchange("all_reduce", devices, 1, 6 * 4)]


def test_a_loop_counts_as_far_as_its_condition_does():
    """Where the text does not say how often it turns, as a TPU's does not."""
    condition = "ROOT %go = pred[] constant(true)"
    assert condition in TEXT
    counted = TEXT.replace(
        condition,
        "%limit = s32[]{:T(128)} constant(7), metadata={}\n  %at = s32[] get-tuple-element(%carry), index=2\n"
        "  ROOT %go = pred[] compare(%at, %limit), direction=LT",
    )
    program = Program(counted)
    assert program.traffic(program.entry) == 7 * program.traffic("body") + 2 * 1000 * 10 * 4
    assert [one.count for one in program.exchanges(program.entry)] == [14, 7]


def test_a_scatter_of_a_sum_is_no_sum():
    """A TPU's compiler fuses a reduce-scatter as a padded sum, of which each device takes a part."""
    text = """
%all-reduce-scatter.2 (input: bf16[30,4]) -> bf16[16,4] {
  %input = bf16[30,4]{1,0} parameter(0)
  %pad = bf16[32,4]{1,0} pad(%input), padding=0_2x0_0
  %sum = bf16[32,4]{1,0} all-reduce(%pad), replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %part = bf16[16,4]{1,0} dynamic-slice(%sum), dynamic_slice_sizes={16,4}
}

ENTRY %main (x: bf16[30,4]) -> bf16[16,4] {
  %x = bf16[30,4]{1,0} parameter(0)
  ROOT %out = bf16[16,4]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.2
}
"""
    program = Program(text)
    assert program.exchanges(program.entry) == [Exchange("reduce_scatter", 2, 1, 30 * 4 * 2)]


def test_a_program_of_two_loops_has_no_loop_of_its_own():
    twice = TEXT.replace("  ROOT %out", "  %again = (bf16[4,100]{1,0}) while(%carry), body=%body\n  ROOT %out")
    with pytest.raises(ValueError, match="too many values"):
        Program(twice).loop_body()
