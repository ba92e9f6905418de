"""The frames between front and worker."""

from __future__ import annotations

import json
import struct
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ogpu.service import wire
from ogpu.service.errors import WireError

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=50)
MESSAGES = st.one_of(
    st.builds(
        wire.Launch,
        slot=st.integers(0, 9),
        generation=st.integers(1, 9),
        max_result_bytes=st.integers(1, 2**31),
        max_rss_bytes=st.none() | st.integers(1, 2**40),
        temp_dir=st.none() | TEXT,
        log_level=TEXT,
        may_spin=st.booleans(),
        environment=st.dictionaries(TEXT, TEXT, max_size=3),
    ),
    st.builds(
        wire.Run,
        run=st.integers(0, 2**53),
        function=TEXT,
        task_address=TEXT,
        attempt=st.integers(1, 1000),
        deadline_at=st.none() | st.floats(0, 1e10),
        deadline_s=st.none() | st.floats(0, 1e10),
    ),
    st.builds(
        wire.Progressed,
        run=st.integers(0, 2**53),
        fraction=st.floats(0, 1),
        message=st.none() | TEXT,
    ),
    st.builds(
        wire.Done,
        run=st.integers(0, 2**53),
        has_output=st.booleans(),
        checksum=st.integers(0, 2**32 - 1),
        recycle=st.none() | TEXT,
    ),
    st.builds(
        wire.Failed,
        run=st.integers(0, 2**53),
        reason=TEXT,
        message=TEXT,
        exception=st.none() | TEXT,
        traceback=st.none() | TEXT,
    ),
    st.builds(
        wire.Gone,
        slot=st.integers(0, 9),
        generation=st.integers(1, 9),
        exit_code=st.none() | st.integers(0, 255),
        signal=st.none() | st.integers(1, 64),
    ),
)


@given(st.lists(st.tuples(MESSAGES, st.binary(max_size=300)), max_size=8), st.data())
def test_frames_survive_any_cutting_of_the_stream(
    frames: list[tuple[wire.Message, bytes]], data: st.DataObject
) -> None:
    """However the kernel cuts the stream into reads, the same messages come out."""
    stream = b"".join(wire.encode_frame(message, payload) for message, payload in frames)
    decoder = wire.FrameDecoder(300)
    found = []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        found += decoder.feed(stream[:size])
        stream = stream[size:]
    assert found == frames


@given(st.binary(min_size=8, max_size=200))
def test_garbage_is_refused_and_nothing_else_happens(garbage: bytes) -> None:
    """Any bytes at all give messages, nothing yet, or WireError."""
    decoder = wire.FrameDecoder(100)
    try:
        for message, payload in decoder.feed(garbage):
            assert type(message).__name__
            assert len(payload) <= 100
    except WireError:
        return


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
NAMES = st.sampled_from(sorted(wire._TYPES)) | st.text(max_size=5)
HEADERS = st.one_of(
    MESSAGES.map(wire.encode_header),
    st.tuples(NAMES, st.lists(JSON, max_size=8)).map(
        lambda it: json.dumps([it[0], *it[1]]).encode()
    ),
    JSON.map(lambda value: json.dumps(value).encode()),
    st.binary(max_size=60),
)
PIECES = st.one_of(
    st.binary(max_size=60),
    st.builds(struct.Struct("!II").pack, st.integers(0, 60), st.integers(0, 60)),
    st.builds(
        lambda header, payload: struct.pack("!II", len(header), len(payload)) + header + payload,
        HEADERS,
        st.binary(max_size=40),
    ),
)


@settings(deadline=None)
@given(HEADERS)
def test_a_header_is_a_message_or_refused(header: bytes) -> None:
    """Whatever JSON says, or what is none: a message that can be said again, or WireError."""
    try:
        message = wire.decode_header(header)
    except WireError:
        return
    assert isinstance(wire.encode_header(message), bytes)


@settings(deadline=None)
@given(st.lists(PIECES, max_size=6), st.data())
def test_a_decoder_holds_no_more_than_one_frame_and_raises_nothing_else(
    pieces: list[bytes], data: st.DataObject
) -> None:
    """Frames, halves of them and garbage, however they are cut: messages, or WireError."""
    stream = b"".join(pieces)
    with mock.patch.object(wire, "MAX_HEADER_BYTES", 50):
        decoder = wire.FrameDecoder(20)
        while stream:
            size = data.draw(st.integers(1, len(stream)))
            try:
                for _, payload in decoder.feed(stream[:size]):
                    assert len(payload) <= 20
            except WireError:
                return
            assert len(decoder._buffer) < 8 + 50 + 20
            stream = stream[size:]


def test_a_huge_frame_is_refused_before_it_is_read() -> None:
    """A header that announces 4 GiB costs no memory: it is refused as soon as it is seen."""
    decoder = wire.FrameDecoder(max_payload_bytes=1000)
    with pytest.raises(WireError, match="at most"):
        list(decoder.feed(struct.pack("!II", 10, 2**32 - 1)))


@pytest.mark.parametrize(
    "header",
    [b"", b"{}", b"[]", b'["Nothing"]', b'["Done"]', b'["Done",1,2,3]', b'[["Done"],1]', b"\xff"],
)
def test_a_header_that_is_no_message_is_refused(header: bytes) -> None:
    with pytest.raises(WireError):
        wire.decode_header(header)


@given(st.integers(0, 100), TEXT)
def test_a_log_record_is_one_line(level: int, text: str) -> None:
    """A record, whatever its text, is one line of output, and comes back whole."""
    line = wire.encode_log(level, text)
    assert "\n" not in line
    assert wire.decode_log(line) == (level, text)


@pytest.mark.parametrize(
    "line", ["", "hello", "[20, 'x']", "\x1e", "\x1e[1]", '\x1e["a", "b"]', "\x1e7"]
)
def test_other_lines_are_no_log_records(line: str) -> None:
    assert wire.decode_log(line) is None
