"""A crowd of clients in a process of its own, so that what they cost does not show in what a test measures.

python load_client.py URL IMAGE CONCURRENCY REQUESTS     sends the image by data URI and as a file, by turns
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from pathlib import Path

import httpx


async def main(url: str, image: bytes, concurrency: int, num_requests: int) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(image).decode()}}
    body = json.dumps({"max_tokens": 50, "messages": [{"role": "user", "content": [part]}]}).encode()
    left = iter(range(num_requests))

    async def client() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=120) as http:
            for i in left:
                if i % 2:
                    data = {"prompt": "x", "max_tokens": "50"}
                    response = await http.post("/v1/generate", data=data, files={"media": image})
                else:
                    response = await http.post("/v1/chat/completions", content=body)
                assert response.status_code == 200, response.text

    await asyncio.gather(*(client() for _ in range(concurrency)))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2]).read_bytes(), int(sys.argv[3]), int(sys.argv[4])))
