"""The frames between front and worker."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ogpu.service import framing, wire
from ogpu.service.errors import WireError
from ogpu.service.processes import resident_bytes

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
        may_spin=st.booleans(),
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
        checksum=st.integers(0, 2**64 - 1),
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


def give(
    decoder: wire.FrameDecoder, data: bytes, *, is_read: bool
) -> Iterator[tuple[wire.Message, bytes]]:
    """Give a decoder bytes, or have it read them as from a socket."""
    if not is_read:
        yield from decoder.feed(data)
        return
    while data:
        buffer = decoder.buffer()
        count = min(len(buffer), len(data))
        buffer[:count] = data[:count]
        yield from decoder.filled(count)
        data = data[count:]


@given(
    st.lists(st.tuples(MESSAGES, st.binary(max_size=300)), max_size=8),
    st.sampled_from((0, 1, 100, framing.LARGE_BYTES)),
    st.data(),
)
def test_frames_survive_any_cutting_of_the_stream(
    frames: list[tuple[wire.Message, bytes]], large_bytes: int, data: st.DataObject
) -> None:
    """However the kernel cuts the stream into reads, the same messages come out."""
    stream = b"".join(wire.encode_frame(message, payload) for message, payload in frames)
    decoder = wire.FrameDecoder(300)
    found = []
    with mock.patch.object(framing, "LARGE_BYTES", large_bytes):
        while stream:
            size = data.draw(st.integers(1, len(stream)))
            found += give(decoder, stream[:size], is_read=data.draw(st.booleans()))
            stream = stream[size:]
    assert found == frames
    assert all(type(payload) is bytes for _, payload in found)


def test_a_large_payload_is_read_to_where_it_stays() -> None:
    """Once the beginning of a large frame is known the rest is one buffer; then comes the next."""
    done, payload = wire.Done(1, has_output=False, checksum=0), b"x" * 10_000_000
    stream = wire.encode_frame(done, payload) + wire.encode_frame(done, b"y")
    decoder = wire.FrameDecoder(len(payload))
    first = len(decoder.buffer())
    assert list(give(decoder, stream[:first], is_read=True)) == []
    assert decoder.is_in_large_payload
    rest = len(decoder.buffer())
    assert rest < len(payload) <= first + rest
    found = list(give(decoder, stream[first:], is_read=True))
    assert found == [(done, payload), (done, b"y")]
    assert not decoder.is_in_large_payload


def test_what_a_frame_announces_takes_no_memory() -> None:
    """A gigabyte that is announced and does not come costs nothing: its pages are not touched."""
    before = resident_bytes(os.getpid())
    decoder = wire.FrameDecoder(2**30)
    head = wire.encode_head(wire.Done(1, has_output=False, checksum=0), 2**30)
    assert list(decoder.feed(head + b"x" * 1000)) == []
    assert decoder.is_in_large_payload
    assert resident_bytes(os.getpid()) - before < 2**27


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
    with mock.patch.multiple(framing, MAX_HEADER_BYTES=50, LARGE_BYTES=10):
        decoder = wire.FrameDecoder(20)
        while stream:
            size = data.draw(st.integers(1, len(stream)))
            try:
                for _, payload in give(decoder, stream[:size], is_read=data.draw(st.booleans())):
                    assert len(payload) <= 20
            except WireError:
                return
            assert len(decoder._rest) < 8 + 50 + 20
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
