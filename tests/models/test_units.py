"""The rows of heads and groups in fused projections, against a loop over the rows."""

import torch
from families import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

from slimgpt.models.blocks import bind
from slimgpt.models.loading import build_skeleton
from slimgpt.models.units import Kept, segment_rows

repeatable = settings(derandomize=True, deadline=None, database=None, max_examples=100)


@repeatable
@given(
    st.lists(st.sampled_from(["head", "group"]), min_size=1, max_size=4),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 3),
    st.booleans(),
)
def test_rows_of_segments(
    segments: list[str], groups: int, per_group: int, size: int, interleaved: bool
) -> None:
    counts = {"group": groups, "head": groups * per_group}
    repeats = groups if interleaved else 1
    expected = [[[] for _ in range(counts[kind])] for kind in segments]
    row = 0
    for repeat in range(repeats):
        for segment, kind in enumerate(segments):
            number = counts[kind] // repeats
            for unit in range(repeat * number, (repeat + 1) * number):
                expected[segment][unit] = list(range(row, row + size))
                row += size
    found = segment_rows(row, segments, counts, repeats)
    assert [kind for kind, _ in found] == segments
    assert [rows.tolist() for _, rows in found] == expected


@repeatable
@given(st.integers(1, 4), st.integers(1, 3), st.data())
def test_rows_that_are_kept_stay_in_order(groups: int, per_group: int, data: st.DataObject) -> None:
    """The rows of Falcon go group by group: its query heads, its key, its value."""
    heads, size = groups * per_group, 6
    config = tiny_config(
        "falcon", num_attention_heads=heads, num_kv_heads=groups, hidden_size=heads * size
    )
    sublayer = next(bind(build_skeleton(config))).sublayers[0]
    rows = torch.arange(groups * (per_group + 2) * size).view(groups, per_group + 2, size)
    if groups == 1:  # then the units are query heads
        kept = data.draw(st.sets(st.integers(0, heads - 1), min_size=1))
        units, wanted = torch.tensor(sorted(kept)), rows[:, [*sorted(kept), per_group, -1]]
        found = sublayer.slices(Kept(units))
    else:
        number = data.draw(st.integers(1, per_group))
        drawn = [
            sorted(data.draw(st.permutations(range(per_group)))[:number]) for _ in range(groups)
        ]
        parts = torch.tensor([g * per_group + head for g in range(groups) for head in drawn[g]])
        found = sublayer.slices(Kept(torch.arange(groups), parts))
        wanted = torch.stack([rows[g, [*drawn[g], per_group, -1]] for g in range(groups)])
    axis, indices = found["query_key_value.weight"]
    assert axis == 0
    assert indices.tolist() == wanted.flatten().tolist()
