"""The code interpreter: what honest code may expect of it, and what hostile code cannot do with what it sends back."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from glmkit.errors import UsageError
from glmkit.interpreter.folder import is_safe_name, list_files, read_file
from glmkit.interpreter.transcript import MAX_IMAGES, Transcript, clean_text, read_image, shorten_traceback
from glmkit.interpreter.wire import MAX_MESSAGE_BYTES, Channel, Received, Signer, WireError

T = TypeVar("T")
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox needs Linux")
for package in ("ipykernel", "jupyter_client", "matplotlib"):
    pytest.importorskip(package)

# --- messages ---


def jupyter_session(key: bytes) -> Any:
    from jupyter_client.session import Session

    return Session(key=key)


def test_jupyters_own_client_reads_what_we_sign_and_we_read_what_it_signs() -> None:
    session, signer = jupyter_session(b"secret"), Signer(b"secret")
    request, parts = signer.write("execute_request", {"code": "中文"})
    read = session.deserialize(parts[1:])
    assert (read["msg_type"], read["msg_id"], read["content"]) == ("execute_request", request, {"code": "中文"})
    answer = session.serialize(session.msg("stream", {"text": "hé"}, parent=read), ident=b"stream.stdout")
    assert signer.read(answer) == Received("stream", request, {"text": "hé"})


def forgeries() -> Iterator[tuple[str, list[bytes]]]:
    _, good = Signer(b"k").write("stream", {"text": "x"})
    yield "another key", Signer(b"other").write("stream", {"text": "x"})[1]
    yield "no signature", [good[0], b"", *good[2:]]
    yield "changed content", [*good[:-1], b'{"text": "y"}']
    yield "no delimiter", good[1:]
    yield "a part too few", good[:-1]
    yield "nothing", []
    signer = Signer(b"k")
    header = good[2]
    for name, parts in {
        "not JSON": [header, b"{}", b"{}", b"\x80\x04."],
        "a pickle": [header, b"{}", b"{}", b"cos\nsystem\n(S'true'\ntR."],
        "a list": [header, b"{}", b"{}", b"[]"],
        "a header without a type": [b"{}", b"{}", b"{}", b"{}"],
        "a type that is no text": [b'{"msg_type": {"a": 1}}', b"{}", b"{}", b"{}"],
        "a parent that is a list": [header, b"[]", b"{}", b"{}"],
        "depth": [header, b"{}", b"{}", b'{"a":' * 200_000],
        "a number of 1 MB": [header, b"{}", b"{}", b'{"a":' + b"9" * (1 << 20) + b"}"],
        "bytes that are no text": [header, b"{}", b"{}", b'{"a": "\xff"}'],
    }.items():
        yield name, [b"<IDS|MSG>", signer._sign(parts), *parts]


@pytest.mark.parametrize(("name", "parts"), forgeries(), ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_not_a_signed_json_object_is_not_a_message(name: str, parts: list[bytes]) -> None:
    assert Signer(b"k").read(parts) is None


GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
READY = b"\x04\x1c\x05READY\x0bSocket-Type\x00\x00\x00\x06ROUTER"


def frame(data: bytes, more: bool = False) -> bytes:
    return bytes([2 | more]) + len(data).to_bytes(8, "big") + data


async def talk_to(folder: Path, sent: Callable[[asyncio.StreamWriter], Coroutine[Any, Any, None]]) -> Channel:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            await sent(writer)

    await asyncio.start_unix_server(serve, folder / "socket")
    return await asyncio.wait_for(Channel.connect(str(folder / "socket"), "DEALER"), 2)


def test_a_message_over_the_limit_is_forgotten_and_the_next_one_arrives(tmp_path: Path) -> None:
    async def sent(writer: asyncio.StreamWriter) -> None:
        writer.write(GREETING + READY + frame(b"one"))
        for _ in range(MAX_MESSAGE_BYTES // (1 << 20) + 2):
            writer.write(frame(bytes(1 << 20), more=True))
            await writer.drain()
        writer.write(frame(b"") + frame(b"", more=True) * 20 + frame(b"") + frame(b"two"))
        await writer.drain()

    async def scenario() -> None:
        channel = await talk_to(tmp_path, sent)
        assert [await channel.receive() for _ in range(4)] == [[b"one"], None, None, [b"two"]]
        channel.close()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "bytes_sent",
    [b"HTTP/1.1 200 OK\r\n\r\n" * 8, GREETING.replace(b"NULL", b"EVIL"), b"\xff" * 64, GREETING[:30]],
    ids=["http", "mechanism", "noise", "short"],
)
def test_what_does_not_greet_as_zeromq_is_refused(tmp_path: Path, bytes_sent: bytes) -> None:
    async def sent(writer: asyncio.StreamWriter) -> None:
        writer.write(bytes_sent)
        writer.write_eof()

    with pytest.raises(WireError):
        asyncio.run(talk_to(tmp_path, sent))


def test_a_message_that_never_ends_ends_the_connection_and_not_the_memory(tmp_path: Path) -> None:
    sent_bytes = 0

    async def sent(writer: asyncio.StreamWriter) -> None:
        nonlocal sent_bytes
        writer.write(GREETING + READY)
        part = frame(bytes(1 << 18), more=True)
        while True:
            writer.write(part)
            await writer.drain()
            sent_bytes += len(part)

    async def scenario() -> None:
        channel = await talk_to(tmp_path, sent)
        channel.limit_bytes = 48 << 20
        before = memory_bytes()
        with pytest.raises(WireError, match="without end"):
            await channel.receive()
        assert memory_bytes() - before < 24 << 20
        channel.close()

    asyncio.run(scenario())
    assert sent_bytes > 40 << 20


def test_zeromqs_own_library_would_keep_all_of_a_message_that_never_ends(tmp_path: Path) -> None:
    """Why there is a reader of our own: limits of its socket bound messages in number and frames in size only."""
    program = f"""
import os, socket, threading, time, zmq
listener = socket.socket(socket.AF_UNIX)
listener.bind({str(tmp_path / "socket")!r})
listener.listen()
def memory():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE")
def serve():
    peer, _ = listener.accept()
    peer.sendall({GREETING!r})
    peer.recv(64, socket.MSG_WAITALL)
    peer.sendall({READY!r})
    peer.recv(20)  # it is ready, too
    before = memory()
    for _ in range(1600):
        peer.sendall({frame(b"x", more=True)[:1]!r} + (65536).to_bytes(8, "big") + bytes(65536))
    print(memory() - before, flush=True)
    os._exit(0)
reader = zmq.Context().socket(zmq.DEALER)
reader.rcvhwm, reader.maxmsgsize = 1, 65536
reader.connect("ipc://" + {str(tmp_path / "socket")!r})
serve()
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 64 << 20


def test_empty_frames_count_too(tmp_path: Path) -> None:
    async def sent(writer: asyncio.StreamWriter) -> None:
        writer.write(GREETING + READY)
        while True:
            writer.write(b"\x01\x00" * 10_000)
            await writer.drain()

    async def scenario() -> None:
        channel = await talk_to(tmp_path, sent)
        channel.limit_bytes = 1 << 20
        with pytest.raises(WireError, match="without end"):
            await channel.receive()
        assert channel.received_bytes < 2 << 20
        channel.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("data", [b"\x05\x01x", b"\xf0\x01x", b"\x04\xff" + b"\x01READY" * 1000, b"\x06" + b"\xff" * 8])
def test_broken_frames_end_the_connection(tmp_path: Path, data: bytes) -> None:
    async def sent(writer: asyncio.StreamWriter) -> None:
        writer.write(GREETING + READY + data)
        writer.write_eof()

    async def scenario() -> None:
        channel = await talk_to(tmp_path, sent)
        with pytest.raises(WireError):
            await asyncio.wait_for(channel.receive(), 2)

    asyncio.run(scenario())


def test_noise_after_the_greeting_never_hangs_and_raises_nothing_else(tmp_path: Path) -> None:
    draw = random.Random(3)

    async def scenario(folder: Path) -> None:
        async def sent(writer: asyncio.StreamWriter) -> None:
            good = GREETING + READY + frame(b"a", more=True) + frame(bytes(300)) + b"\x00\x02hi"
            data = bytearray(good + draw.randbytes(60))
            for _ in range(4):
                data[draw.randrange(64, len(data))] = draw.randrange(256)
            writer.write(bytes(data))
            writer.write_eof()

        with contextlib.suppress(WireError):
            channel = await talk_to(folder, sent)
            while True:  # to the end of the connection
                await asyncio.wait_for(channel.receive(), 2)

    for number in range(60):
        folder = tmp_path / str(number)
        folder.mkdir()
        asyncio.run(scenario(folder))


def memory_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


# --- text and pictures ---


def written(*messages: tuple[str, dict[str, Any]]) -> Transcript:
    transcript = Transcript()
    for kind, content in messages:
        transcript.take(Received(kind, "1", content))
    return transcript


def test_text_is_put_together_line_by_line() -> None:
    transcript = written(
        ("stream", {"name": "stdout", "text": "a"}),
        ("execute_result", {"data": {"text/plain": "42"}}),
        ("error", {"ename": "E", "evalue": "v", "traceback": ["Traceback:\n", "\x1b[31mE: v\x1b[0m\n"]}),
    )
    assert (transcript.text(), transcript.failed) == ("a\n42\nTraceback:\nE: v", True)


def test_a_long_text_keeps_its_beginning_and_its_end_whatever_its_length() -> None:
    transcript = Transcript()
    before = memory_bytes()
    for number in range(3000):
        transcript.take(Received("stream", "1", {"text": f"<{number}>" + "x" * 100_000}))
    transcript.take(Received("stream", "1", {"text": "the end"}))
    text = transcript.text()
    assert (text[:6], text[-8:]) == ("<0>xxx", "xthe end")
    assert len(text) < 66_000
    total = sum(len(f"<{number}>") + 100_000 for number in range(3000)) + len("the end")
    assert f"[… {total - 65_536:,} characters left out …]" in text
    assert memory_bytes() - before < 16 << 20


@pytest.mark.parametrize(
    ("printed", "shown"),
    [
        ("\x1b[1;31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07x", "x"),
        ("\x1b]52;c;Y2xpcA==\x1b\\x", "x"),
        ("\x1b]8;;http://evil\x07link", "link"),
        ("\x1b[2J\x1b[H\x00\x08\x9bx", "x"),
        ("10 %\r50 %\r100 %\nready\r\n", "100 %\nready\n"),
        ("half \ud83d", "half ?"),
        ("<|assistant|>\n中文\ttab", "<|assistant|>\n中文\ttab"),
    ],
)
def test_text_is_clean(printed: str, shown: str) -> None:
    assert clean_text(printed) == shown


def test_cleaning_is_quick_on_the_worst_text() -> None:
    import time

    begun = time.process_time()
    for text in ("\x1b[" * 16_384, "\x1b]" * 16_384, "\x1b[" + "0" * 32_768, "\x1b]" + "x" * 32_768, "\r" * 32_768):
        clean_text(text)
    assert time.process_time() - begun < 1.0


def test_a_huge_traceback_is_quick_and_keeps_its_end() -> None:
    import time

    words = Transcript()
    begun = time.process_time()
    words.take(Received("error", "", {"traceback": ["Traceback:", "\nx" * (4 << 20), "E: the end"]}))
    assert time.process_time() - begun < 0.5
    assert words.text().startswith("Traceback:")
    assert words.text().endswith("E: the end")


def test_tracebacks_are_short_and_do_not_show_where_this_is_installed() -> None:
    import numpy

    file = Path(numpy.__file__).parent / "_core" / "numeric.py"
    kernel = Path(numpy.__file__).parent.parent / "ipykernel" / "iostream.py"
    frames = [f"  File {file}:{number} in f{number}\n    call()" for number in range(50)]
    long = [
        "Traceback:",
        "  Cell In[1], line 1\n    f()",
        *frames,
        "  Cell In[1], line 2\n    g()",
        *frames,
        f"E: {file}",
    ]
    assert shorten_traceback("\n".join(long)) == (
        "Traceback:\n  Cell In[1], line 1\n    f()\n  Cell In[1], line 2\n    g()\n"
        "  File numpy/_core/numeric.py:49 in f49\n    call()\nE: numpy/_core/numeric.py"
    )
    own = [f"  File {kernel}:1 in write\n    wait()", "  File <string>:77 in write\n    wait()", "KeyboardInterrupt"]
    assert (
        shorten_traceback("\n".join([*long[:2], *own]))
        == "Traceback:\n  Cell In[1], line 1\n    f()\nKeyboardInterrupt"
    )
    syntax = "  Cell In[1], line 1\n    1 +\n       ^\nSyntaxError: invalid syntax"
    assert shorten_traceback(syntax) == syntax


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("stream", {}),
        ("stream", {"text": 5}),
        ("stream", {"text": ["x"]}),
        ("display_data", {"data": "x"}),
        ("display_data", {"data": {"text/html": "<script>1</script>", "image/svg+xml": "<svg onload='1'/>"}}),
        ("display_data", {"data": {"text/plain": {"a": 1}, "application/javascript": "1"}}),
        ("display_data", {}),
        ("comm_open", {"data": {"text": "x"}, "text": "x"}),
        ("input_request", {"prompt": "password?", "text": "x"}),
        ("shutdown_reply", {"text": "x"}),
    ],
)
def test_what_is_not_output_leaves_nothing(kind: str, content: dict[str, Any]) -> None:
    transcript = written((kind, content))
    assert (transcript.text(), transcript.images, transcript.failed) == ("", [], False)


def test_no_content_breaks_the_transcript() -> None:
    draw = random.Random(7)
    leaves = [None, True, 0, -1.5, "", "x\ud800\x1b[", "é" * 40_000, [], {}, base64.b64encode(png()).decode()]

    def anything(depth: int = 0) -> Any:
        shape = draw.random()
        if depth > 3 or shape < 0.5:
            return draw.choice(leaves)
        keys = ["text", "name", "data", "traceback", "ename", "image/png", "text/plain", "execution_state"]
        if shape < 0.7:
            return [anything(depth + 1) for _ in range(draw.randrange(3))]
        return {key: anything(depth + 1) for key in draw.sample(keys, 3)}

    transcript = Transcript()
    for _ in range(3000):
        kind = draw.choice(["stream", "display_data", "execute_result", "error", "clear_output", "status", "?"])
        content = {key: anything() for key in ("text", "data", "traceback", "ename", "evalue")}
        transcript.take(Received(kind, "1", content))
        assert len(transcript.images) <= MAX_IMAGES
    assert len(transcript.text().encode()) < 300_000


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int = 2, height: int = 2, between: bytes = b"", after: bytes = b"", body: bytes | None = None) -> bytes:
    rows = body if body is not None else zlib.compress((b"\0" + bytes(width)) * height)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + between + chunk(b"IDAT", rows) + chunk(b"IEND", b"") + after


def test_a_picture_loses_all_that_is_no_picture() -> None:
    bomb = chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(1 << 20))) + chunk(b"acTL", bytes(8))
    dirty = png(between=bomb, after=b"<script>alert(1)</script>")
    assert read_image(base64.b64encode(dirty).decode()) == png()


@pytest.mark.parametrize(
    "data",
    [
        png(50_000, 50_000, body=b"x"),
        png(4097, 1, body=b"x"),
        png(0, 1, body=b"x"),
        png()[:-1],
        png().replace(b"IDAT", b"IDAU"),
        png()[:30],
        b"\x89PNG\r\n\x1a\n",
        b"<svg/>",
        b"GIF89a",
        png(between=chunk(b"IHDR", bytes(13))),
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I4s", 0xFFFFFFFF, b"IHDR") + bytes(40),
        png(body=bytes(5 << 20)),
    ],
    ids=["bomb", "wide", "empty", "cut", "crc", "short", "signature", "svg", "gif", "two headers", "size", "large"],
)
def test_pictures_that_are_none_are_left_out(data: bytes) -> None:
    encoded = base64.b64encode(data).decode()
    assert read_image(encoded) is None
    transcript = written(("display_data", {"data": {"image/png": encoded}}))
    assert not transcript.images
    assert "picture left out" in transcript.text()


@pytest.mark.parametrize("data", [None, 5, ["x"], "!!!", "é", "\ud800", ""])
def test_pictures_that_are_not_base64_are_left_out(data: object) -> None:
    assert read_image(data) is None


def test_pictures_are_counted() -> None:
    picture = ("display_data", {"data": {"image/png": base64.b64encode(png()).decode(), "text/plain": "<Figure>"}})
    transcript = written(*[picture] * (MAX_IMAGES + 3))
    assert len(transcript.images) == MAX_IMAGES
    assert transcript.text() == f"[3 × picture left out: only the first {MAX_IMAGES} are shown]"


# --- files ---


def test_only_plain_files_are_listed_and_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    place = tmp_path / "data"
    place.mkdir()
    (place / "plain.csv").write_text("a,b")
    (place / "中文 图.png").write_bytes(b"x")
    (place / "link").symlink_to(secret)
    (place / "hard").hardlink_to(secret)
    (place / "folder").mkdir()
    (place / "back").symlink_to("..")
    os.mkfifo(place / "pipe")
    for name in ("new\nline", "esc\x1b[31m", "bidi\u202egnp.exe", ".hidden", "a\\b", 'q"', "x" * 201):
        (place / name).write_text("x")
    (place / os.fsdecode(b"bad\xff")).write_text("x")
    assert (place / "link").read_text() == (place / "hard").read_text() == "secret"  # as a careless server would
    folder = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    try:
        assert [file.name for file in list_files(folder)] == ["plain.csv", "中文 图.png"]
        assert read_file(folder, "plain.csv", 10) == b"a,b"
        for name in ("link", "hard", "pipe", "folder", "../secret", "back/secret", str(secret), "", ".", "..", "a\0b"):
            with pytest.raises(UsageError):
                read_file(folder, name, 10)
        with pytest.raises(UsageError, match="at most 2 bytes"):
            read_file(folder, "plain.csv", 2)
    finally:
        os.close(folder)


def test_a_name_that_changes_while_it_is_read_leads_nowhere(tmp_path: Path) -> None:
    import threading

    secret = tmp_path / "secret"
    secret.write_text("secret")
    place = tmp_path / "data"
    place.mkdir()
    over = threading.Event()

    def change() -> None:
        (place / "plain~").write_text("plain")
        (place / "link~").symlink_to(secret)
        os.mkfifo(place / "pipe~")
        while not over.is_set():
            for name in ("plain~", "link~", "pipe~"):
                with contextlib.suppress(OSError):
                    os.link(place / name, place / "new~", follow_symlinks=False)
                    os.replace(place / "new~", place / "file")
            (place / "file").unlink(missing_ok=True)
            (place / "file").write_text("plain")

    changer = threading.Thread(target=change)
    changer.start()
    folder = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    read = set()
    try:
        for _ in range(3000):
            list_files(folder)
            with contextlib.suppress(UsageError):
                read.add(read_file(folder, "file", 100))
    finally:
        over.set()
        changer.join()
        os.close(folder)
    assert b"plain" in read
    assert read <= {b"plain", b""}


def test_sparse_files_are_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(1 << 40)
    folder = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        assert list_files(folder)[0].size_bytes == 1 << 40
        with pytest.raises(UsageError):
            read_file(folder, "sparse", 1 << 20)
    finally:
        os.close(folder)


@pytest.mark.parametrize("name", ["", ".", "..", "~", "-rf", "a/b", "a\tb", "\u200b", "a\u2028b", "x" * 201])
def test_odd_names(name: str) -> None:
    assert not is_safe_name(name)
