"""What may come in: any bytes in any pieces are frames, blank lines or malformed frames, in bounded memory."""

import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import DIMS, NAMES

from sage_ext.live.frames import JsonLines, MalformedFrame, RawFloats

garbage = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([b"", b" ", b"{}", b'{"audio":null}', b'{"t":1}', b"null", b'"', b"\xef\xbb\xbf{}", b"\r"]),
    st.dictionaries(
        st.sampled_from(["audio", "visual", "t", "frame", "x"]),
        st.one_of(st.none(), st.lists(st.one_of(st.floats(), st.integers(), st.booleans()), max_size=4), st.text(max_size=3)),
        max_size=3,
    ).map(lambda x: json.dumps(x).encode()),
    st.lists(st.floats(width=32), min_size=3, max_size=3).map(lambda x: json.dumps({"audio": x, "visual": [1, 2]}).encode()),
)  # fmt: skip


@settings(max_examples=60)
@given(st.lists(garbage, max_size=8), st.data())
def test_any_bytes_in_any_pieces(parts, data):
    """Cuts between blocks change nothing; every line is a frame, blank, or MalformedFrame; frames are what they must be."""
    whole = b"\n".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)])]
    form = JsonLines(NAMES, (3, 2))
    records = list(form.records(pieces))
    want = whole.split(b"\n")
    assert records == (want if want[-1] else want[:-1])
    for record in records:
        try:
            frame = form.read(record)
        except MalformedFrame as error:
            assert str(error).isascii()
            continue
        if frame is not None:
            assert [x.shape for x in frame.features] == [(1, 3), (1, 2)]
            assert all(x.dtype == np.float32 for x in frame.features)
            json.dumps(frame.echo, allow_nan=False)
    raw = RawFloats((3, 2))
    cut = [r for r in raw.records(pieces) if isinstance(r, bytes)]
    assert b"".join(cut) == whole[: len(whole) // 20 * 20]
    assert all(raw.read(r).features[1].shape == (1, 2) for r in cut)


@pytest.mark.parametrize("key", ["t", "frame", "audio", "other"])
def test_a_line_of_any_depth_is_at_worst_malformed(key):
    """Python's recursion limit is met somewhere within these, in reading the line or in showing what came."""
    form = JsonLines(NAMES, DIMS)
    for depth in [*range(1, 1100), 30_000]:
        for opened, closed in ((b"[", b"]"), (b'{"a":', b"}")):
            with pytest.raises(MalformedFrame):
                form.read(b'{"%s": %s1%s}' % (key.encode(), opened * depth, closed * depth))


def test_a_line_without_an_end_takes_bounded_memory():
    form = JsonLines(NAMES, DIMS)
    block = b"x" * (1 << 16)
    tracemalloc.start()
    records = list(form.records([*[block] * 2000, b"\n{}\n"]))  # 131 MB
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [type(r) for r in records] == [MalformedFrame, bytes]
    assert peak < 1 << 20
