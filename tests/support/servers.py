"""An HTTP server in a thread, for the tests of remote reading: ranges, and what goes wrong with them."""

import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class InThread(ThreadingHTTPServer):
    """Answers on a free port of this machine, in a thread of its own, while it is entered."""

    daemon_threads = True

    def __init__(self, handler):
        super().__init__(("127.0.0.1", 0), handler)
        self.lock = threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()
        self._thread.join()

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_):
        """A client that went away is no fault."""


class Server(InThread):
    """Serves `files`, bytes or what maps them. Each answer comes `delay` seconds later than it could.

    `drops` answers that carry more than 4 KB end in the middle, at another place each time.
    """

    def __init__(self, files, *, ranges=True, drops=0, busy=0, grow=None, delay=0.0):
        super().__init__(_Handler)
        self.delay = delay
        self.files, self.ranges, self.drops, self.busy, self.grow = dict(files), ranges, drops, busy, grow
        self.requests, self.sent, self.dropped = 0, 0, 0

    def url(self, name):
        return f"{self.endpoint}/{name}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server
        with server.lock:
            server.requests += 1
            busy, server.busy = server.busy > 0, max(0, server.busy - 1)
            number = server.requests
        time.sleep(server.delay)
        if busy:
            return self.answer(503, b"")
        data = server.files.get(self.path.lstrip("/"))
        if data is None:
            return self.answer(404, b"nothing here")
        if server.grow and number > 1:
            data = data + bytes(server.grow)
        asked = re.match(r"bytes=(\d+)-(\d+)$", self.headers.get("Range", ""))
        if not asked or not server.ranges:
            return self.answer(200, data)
        first, last = int(asked[1]), min(int(asked[2]), len(data) - 1)
        if first >= len(data):
            return self.answer(416, b"", f"bytes */{len(data)}")
        return self.answer(206, memoryview(data)[first : last + 1], f"bytes {first}-{last}/{len(data)}")

    def answer(self, status, body, place=None):
        self.send_response(status)
        if place:
            self.send_header("Content-Range", place)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with self.server.lock:
            drop = len(body) > 4096 and self.server.drops > 0
            self.server.drops -= drop
            self.server.dropped += drop
            end = len(body) * (self.server.dropped % 7 + 1) // 9 if drop else len(body)
            self.server.sent += end
        self.wfile.write(body[:end])
        if drop:
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
