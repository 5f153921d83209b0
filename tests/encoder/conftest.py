"""The default model in every dtype, and a real HTTP server on loopback for the encoders that ask one."""

import functools
import json
import os
import signal
import threading
import time
import traceback
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

import pytest

from mrl_rag import MatryoshkaEncoder


class Answer(NamedTuple):
    status: int
    body: object
    headers: dict = {}  # noqa: RUF012


class Loopback:
    """Serves one protocol: `respond(path, headers, body)` returns an `Answer`.

    Answers put into `script` are given first, one a request; None stands for the protocol's own answer, and
    "hang up" for none at all.
    """

    def __init__(self, respond):
        self.respond = respond
        self.script = []
        self.bodies = []
        self.headers = []
        self.statuses = []
        self.times = []
        self.seconds = 0.0
        self.most_in_flight = self._in_flight = 0
        self._lock = threading.Lock()
        loopback = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *args):
                pass

            def do_GET(self):
                self.do_POST()

            def do_POST(self):
                loopback._serve(self)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *request: None  # a client that was interrupted has hung up
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def _serve(self, handler):
        body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        with self._lock:
            self._in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._in_flight)
            self.times.append(time.monotonic())
            self.headers.append(handler.headers)
            scripted = self.script.pop(0) if self.script else None
        time.sleep(self.seconds)
        if scripted == "hang up":
            handler.close_connection = True
            self._in_flight -= 1
            return
        try:
            answer = scripted or self._check(handler, body)
        finally:
            with self._lock:
                self._in_flight -= 1
        self.statuses.append(answer.status)
        data = answer.body.encode() if isinstance(answer.body, str) else json.dumps(answer.body).encode()
        handler.send_response(answer.status)
        for name, value in ({"Content-Type": "application/json"} | answer.headers).items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def _check(self, handler, body):
        if handler.command != "POST":
            return Answer(405, {"error": {"message": f"{handler.command} is not allowed"}})
        if handler.headers.get_content_type() != "application/json":
            return Answer(415, {"error": {"message": "Content-Type must be application/json"}})
        try:
            read = json.loads(body)
        except ValueError:
            return Answer(400, {"error": {"message": "the body is no JSON"}})
        if not isinstance(read, dict):
            return Answer(400, {"error": {"message": "the body is no object"}})
        self.bodies.append(read)
        return self.respond(handler.path, handler.headers, read)

    def close(self):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def serve():
    """Start a server that answers by `respond`; it ends with the test."""
    servers = []

    def start(respond):
        servers.append(Loopback(respond))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def answer():
    return Answer


@pytest.fixture
def in_child():
    """Run a function in a fork of this process; it must come to its end in half a minute."""
    if not hasattr(os, "fork"):
        pytest.skip("this system doesn't fork")

    def run(work):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # CPython 3.12 on, in a process that has threads
            pid = os.fork()
        if pid == 0:
            code = 1
            try:
                signal.alarm(30)
                work()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

    return run


@pytest.fixture(scope="session")
def minilms():
    """One encoder a dtype, for all who ask."""
    return functools.cache(lambda dtype: MatryoshkaEncoder("minilm", device="cpu", dtype=dtype))


@pytest.fixture
def minilm(minilms, default_dtype):
    return minilms(default_dtype)
