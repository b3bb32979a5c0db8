"""An HTTP server that does what a test tells it: answers, or fails in the ways real ones do."""

import json
import socket
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Reply:
    body: object = None
    """JSON, or raw bytes."""
    status: int = 200
    headers: dict = field(default_factory=dict)
    delay: float = 0.0
    drip: float = 0.0
    """Seconds between two bytes."""
    cut: bool = False
    """Close the connection in the middle of the body."""


def chat(content, finish="stop"):
    return {"choices": [{"message": {"content": content}, "finish_reason": finish}]}


class Scripted(ThreadingHTTPServer):
    """`script(body, attempt)` gives the Reply (or just its body) to a POST; attempts at the same body are counted from 0."""

    daemon_threads, block_on_close, request_queue_size = True, False, 128

    def __init__(self, script):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.requests, self.sent_headers, self.times = script, [], [], []
        self.models, self.under_way, self.most_under_way, self.lock = [{"id": "tiny"}], 0, 0, threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        pass  # clients that gave up


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.send(Reply({"data": self.server.models}))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            attempt = server.requests.count(body)
            server.requests.append(body)
            server.sent_headers.append(dict(self.headers))
            server.times.append(time.monotonic())
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
        reply = server.script(body, attempt)
        reply = reply if isinstance(reply, Reply) else Reply(reply)
        time.sleep(reply.delay)
        with server.lock:
            server.under_way -= 1
        self.send(reply)

    def send(self, reply):
        raw = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        self.send_response(reply.status)
        for name, value in {"Content-Length": str(len(raw)), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if reply.cut:
            raw, self.close_connection = raw[: len(raw) // 2], True
        for i in range(0, len(raw), 1 if reply.drip else len(raw)):
            self.wfile.write(raw[i : i + (1 if reply.drip else len(raw))])
            time.sleep(reply.drip)

    def log_message(self, *args):
        pass


@contextmanager
def serving(script):
    server = Scripted(script)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        with suppress(OSError):
            server.shutdown()
            server.server_close()


def free_url():
    """Of a port where nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/v1"
