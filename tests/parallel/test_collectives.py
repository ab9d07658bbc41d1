# ruff: noqa: E501  (HLO as XLA prints it)
"""What is read from a compiled program's text."""

from flexmemory.train.collectives import collectives, traffic

HLO = """HloModule jit_step, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %s = f32[] add(%a, %a)
}

%body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %g = f32[32]{0} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %y)
}

%branch (p: f32[8]) -> f32[8] {
  ROOT %r = f32[2]{0} reduce-scatter(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, to_apply=%add
}

ENTRY %main.9 (p: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]{0}) while(%init), condition=%cond, body=%body.1, backend_config={"known_trip_count":{"n":"24"}}
  %one = f32[4]{0} all-reduce(%z), replica_groups={{0},{1}}, to_apply=%add
  %r = bf16[3,5]{1,0} all-reduce(%z), replica_groups={{0,1}}, to_apply=%add
  %a = (f32[2,3]{1,0}, f32[2,3]{1,0}) all-to-all(%p, %q), replica_groups={{0,1}}
  %s = (f32[4]{0}, f32[16]{0}) all-gather-start(%p), replica_groups=[2,4]<=[8], dimensions={0}
  %d = f32[16]{0} all-gather-done(%s)
  ROOT %c = f32[8]{0} conditional(%i, %p, %p), branch_computations={%branch, %other}
}
"""


def test_loops_count_their_rounds_and_lone_devices_send_nothing():
    found = {(row["kind"], row["shape"]): (row["bytes"], row["count"]) for row in collectives(HLO)}
    assert found == {
        ("all-gather", "f32[32]"): (128, 24),
        ("all-reduce", "bf16[3,5]"): (30, 1),
        ("all-to-all", "f32[2,3] f32[2,3]"): (48, 1),
        ("all-gather", "f32[16]"): (64, 1),
        ("reduce-scatter", "f32[2]"): (8, 1),
    }
    assert traffic(collectives(HLO)) == 128 * 24 + 30 + 48 + 64 + 8
    assert collectives(HLO)[0]["count"] == 24
