"""A reward service: any reward function, for trainers on other machines to ask over HTTP.

    python -m examples.reward_service math --port 8001
    bash examples/train_drpo_gpt.sh --reward http://127.0.0.1:8001/ [flags]

In: POST {"requests": [{"prompt": ..., "response": ..., "answer": ..., "finish_reason": ...,
"metadata": {...}}, ...]}. Out: {"rewards": [1.0, null, ...]}, one for each, null where there is
none. It works on one request after the other and listens to this machine alone, unless --host says
otherwise: whoever reaches it may use it. A service of your own may be in any language.
"""

from __future__ import annotations

import argparse
import json
import traceback
from http.server import BaseHTTPRequestHandler, HTTPServer

from megatron_drpo.rewards import Reward, RewardRequest, load_reward


def answer(reward: Reward, body: bytes) -> bytes:
    """What to answer to the body of a POST."""
    rewards: list[float | None] = []
    for request in json.loads(body)["requests"]:
        try:
            rewards.append(float(reward(RewardRequest(**request))))
        except Exception:  # the trainer names the sample; the reason is shown here
            traceback.print_exc()
            rewards.append(None)
    return json.dumps({"rewards": rewards}).encode()


def serve(reward: Reward, host: str, port: int) -> None:
    """Answer until the process is ended."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # noqa: N802, the name that http.server looks for
            content = answer(reward, self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    with HTTPServer((host, port), Handler) as server:
        print(f"listening on http://{host}:{server.server_address[1]}/", flush=True)
        server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a reward function over HTTP.")
    parser.add_argument("reward", help="exact, math or MODULE:FUNCTION")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8001)
    arguments = parser.parse_args()
    serve(load_reward(arguments.reward), arguments.host, arguments.port)


if __name__ == "__main__":
    main()
