"""A deterministic OpenAI-compatible server, and a proxy that treats what goes through it badly."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import random
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """Answers a chat or a completion with a text that is a function of what was asked and of the seed. asked: every
    body, in order. behave(body) -> None, or (code, headers, object) in place of the reply. write(question, body) -> the
    text, in place of that."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, behave=None, key=None, usage=True, write=None):
        super().__init__(("127.0.0.1", 0), _Answer)
        self.behave, self.key, self.usage, self.write = behave, key, usage, write
        self.asked, self.lock = [], threading.Lock()
        self.at_once = self.most = 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def _send(self, code, value, headers=()):
        data = json.dumps(value).encode()
        self.send_response(code)
        for name, text in {"Content-Type": "application/json", "Content-Length": len(data), **dict(headers)}.items():
            self.send_header(name, str(text))
        self.end_headers()
        self.wfile.write(data)

    def _refused(self):
        wanted = self.server.key and f"Bearer {self.server.key}"
        if wanted and self.headers.get("Authorization") != wanted:
            shown = self.headers.get("Authorization", "nothing")
            self._send(401, {"error": {"message": f"Incorrect API key provided: {shown}", "code": "invalid_api_key"}})
            return True
        return False

    def do_GET(self):
        if not self._refused():
            self._send(200, {"object": "list", "data": [{"id": "test-model", "object": "model"}]})

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._refused():
            return
        with server.lock:
            server.asked.append(body)
            server.at_once += 1
            server.most = max(server.most, server.at_once)
        try:
            other = server.behave(body) if server.behave else None
            if other is not None:
                code, headers, value = other
                self._send(code, value, headers)
                return
            self._send(200, reply_to(body, self.path, server.usage, server.write))
        finally:
            with server.lock:
                server.at_once -= 1


def text_of(body):
    """What the server writes: the digest of the question and the seed, and the question's last words."""
    question = question_of(body)
    mark = hashlib.sha256(json.dumps([question, body.get("seed")]).encode()).hexdigest()[:8]
    return f"{mark} {question[-40:]}"


def question_of(body):
    return body["messages"][-1]["content"] if "messages" in body else body["prompt"]


def reply_to(body, path, usage=True, write=None):
    text = text_of(body) if write is None else write(question_of(body), body)
    choice = {"index": 0, "finish_reason": "stop"}
    if path.endswith("/chat/completions"):
        choice["message"] = {"role": "assistant", "content": text}
    else:
        choice["text"] = text
    value = {"object": "chat.completion", "model": body["model"], "choices": [choice]}
    counts = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    return {**value, "usage": counts} if usage else value


class Proxy(ThreadingHTTPServer):
    """In front of a server: of every five requests some are dropped before or after the server has seen them, delayed,
    cut in the middle, or answered 429 or 500. done: what befell the requests."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, server, seed=0, share=0.6):
        super().__init__(("127.0.0.1", 0), _Bad)
        self.behind, self.share = server, share
        self.rng, self.lock, self.done = random.Random(seed), threading.Lock(), []

    url = Server.url

    def fate(self):
        with self.lock:
            kinds = ("drop", "lose", "delay", "cut", "429", "500")
            found = self.rng.choice(kinds) if self.rng.random() < self.share else "good"
            self.done.append(found)
            return found


class _Bad(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def _hang_up(self):
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def do_GET(self):
        self._forward("GET", None, "good")

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        fate = self.server.fate()
        if fate == "drop":
            self._hang_up()
        elif fate in ("429", "500"):
            data = json.dumps({"error": {"message": f"bad luck {fate}"}}).encode()
            self.send_response(int(fate))
            self.send_header("Content-Length", str(len(data)))
            if fate == "429":
                self.send_header("Retry-After", "0.05")
            self.end_headers()
            self.wfile.write(data)
        else:
            time.sleep(0.1 if fate == "delay" else 0)
            self._forward("POST", body, fate)

    def _forward(self, method, body, fate):
        host, port = self.server.behind.server_address
        connection = http.client.HTTPConnection(host, port, timeout=30)
        headers = {k: v for k, v in self.headers.items() if k.lower() in ("authorization", "content-type")}
        connection.request(method, self.path, body, headers)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        if fate == "lose":
            self._hang_up()
            return
        self.send_response(answer.status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if fate == "cut" else data)
        if fate == "cut":
            self._hang_up()


@contextlib.contextmanager
def running(server):
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
