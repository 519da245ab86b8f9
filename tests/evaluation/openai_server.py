"""An OpenAI-compatible endpoint over HTTP whose answers a test decides, faults included."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """What the server sends: a text as a right answer and why it ends, or another status, body or delay in seconds."""

    text: str | None = None
    status: int = 200
    body: bytes | None = None
    delay: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)
    finish_reason: str = "stop"


@dataclass
class Script:
    """The requests that came, their headers with the key and times (`time.perf_counter`), and the server's address."""

    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    times: list[float] = field(default_factory=list)


@contextmanager
def scripted_endpoint(answer: Callable[[str, int], Reply]) -> Iterator[Script]:
    """Serves `answer(the words of the request, times that they came before)`."""
    lock = threading.Lock()
    asked: dict[str, int] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            content = request["messages"][-1]["content"]
            parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
            words = "".join(part.get("text", "") for part in parts)
            with lock:
                script.requests.append(request)
                script.times.append(time.perf_counter())
                script.keys.append(self.headers["Authorization"])
                before = asked.get(words, 0)
                asked[words] = before + 1
            reply = answer(words, before)
            time.sleep(reply.delay)
            message = {"role": "assistant", "content": reply.text}
            completion = {
                "id": "x",
                "object": "chat.completion",
                "created": 0,
                "model": request["model"],
                "choices": [{"index": 0, "message": message, "finish_reason": reply.finish_reason}],
                "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
            }
            body = json.dumps(completion).encode() if reply.body is None else reply.body
            try:
                self.send_response(reply.status)
                for name, value in {"Content-Type": "application/json", **reply.headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
            except ConnectionError:  # the client has given up
                pass

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    script = Script(f"http://127.0.0.1:{server.server_address[1]}/v1")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield script
    finally:
        server.shutdown()
        server.server_close()
