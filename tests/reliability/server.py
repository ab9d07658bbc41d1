"""A folder behind a web server on loopback, as http and as an S3 endpoint serve it, with faults on
demand.
"""

import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Server(ThreadingHTTPServer):
    """``fault(what, path, times, after)``: requests whose path matches meet it, so many times, the
    first ``after`` of them left alone.

    what: a status; "drop": the connection ends without an answer; "half": it ends in the middle of
    the body; "silent": nothing comes; ("slow", seconds): the answer comes late.
    """

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.faults, self.met, self.closing, self.lock = (
            folder,
            [],
            0,
            threading.Event(),
            threading.Lock(),
        )
        self.silent = threading.Event()  # a request is being met with silence
        self.url = f"http://127.0.0.1:{self.server_port}"

    def fault(self, what, path: str, times: float = 1e9, after: int = 0) -> None:
        self.faults.append([what, re.compile(path), times, after])

    def next_fault(self, path: str):
        with self.lock:
            for entry in self.faults:
                if entry[1].search(path) and entry[2] > 0:
                    entry[3] -= 1
                    if entry[3] >= 0:
                        return None
                    entry[2] -= 1
                    self.met += 1
                    if entry[0] == "silent":
                        self.silent.set()
                    return entry[0]
        return None

    def mend(self) -> None:
        with self.lock:
            self.faults.clear()
            self.silent.clear()
            self.closing.set()  # lets the silent ones go
            self.closing = threading.Event()

    def handle_error(self, request, client_address):
        pass  # a client that gave up


class Handler(BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

    def do_GET(self):
        fault, closing = self.server.next_fault(self.path), self.server.closing
        if fault == "drop":
            return self.hang_up()
        if fault == "silent":
            closing.wait(60)
            return self.hang_up()
        if isinstance(fault, int):
            return self.answer(fault, b"")
        if isinstance(fault, tuple):
            closing.wait(fault[1])
        path = self.server.folder / self.path.lstrip("/")
        if not path.is_file():
            return self.answer(404, b"")
        data, asked = (
            path.read_bytes(),
            re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")),
        )
        if not asked:
            return self.answer(200, data, cut=fault == "half")
        first, last = asked.groups()
        start = int(first) if first else max(0, len(data) - int(last))
        stop = min(int(last) + 1, len(data)) if first and last else len(data)
        if start >= stop:
            return self.answer(416, b"")
        self.answer(
            206, data[start:stop], f"bytes {start}-{stop - 1}/{len(data)}", cut=fault == "half"
        )

    do_HEAD = do_GET

    def answer(self, status: int, data: bytes, content_range: str = "", cut: bool = False):
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", '"tag"')
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.hang_up()

    def hang_up(self):
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_):
        pass
