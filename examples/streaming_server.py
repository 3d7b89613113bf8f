"""A streaming server: each client gets a stream of its own, and an estimate for each frame that it sends.

    python examples/streaming_server.py

A frame is a line of JSON, {"audio": [...], "visual": [...]}; null in place of a list: the modality is missing. The answer is a
line too. All clients share one session, a row each: the weights are in memory once. For one stream there is `sage-ext stream`.
"""

import asyncio
import json
import math

import torch

from sage_ext.models import SAGE

SIZES = {"audio": 8, "visual": 12}
CLIENTS = 16


class Server:
    """Rows of one session, given to clients as they come."""

    def __init__(self, model: SAGE) -> None:
        self.session = model.eval().stream(batch_size=CLIENTS)
        self.free: asyncio.Queue[int] = asyncio.Queue()
        for row in range(CLIENTS):
            self.free.put_nowait(row)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        row = await self.free.get()  # where all are taken, the next client waits
        self.session.reset(row)  # the stream before it is forgotten
        try:
            while line := await reader.readline():
                writer.write(json.dumps(self.estimate(row, json.loads(line))).encode() + b"\n")
                await writer.drain()
        finally:
            self.free.put_nowait(row)
            writer.close()

    def estimate(self, row: int, frame: dict[str, list[float] | None]) -> dict[str, list[float]]:
        features = {name: torch.full((CLIENTS, size), math.nan) for name, size in SIZES.items()}  # NaN: missing
        for name in SIZES:
            if frame.get(name) is not None:
                features[name][row] = torch.tensor(frame[name])
        active = torch.zeros(CLIENTS, dtype=torch.bool)
        active[row] = True  # the other rows stand still: this is nobody else's frame
        out = self.session.step(features, active=active)
        return {"estimate": out.prediction[row].tolist(), "weights": out.weights[row].tolist()}


async def client(port: int, frames: list[dict]) -> list[dict]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answers = []
    for frame in frames:
        writer.write(json.dumps(frame).encode() + b"\n")
        answers.append(json.loads(await reader.readline()))
    writer.close()
    return answers


async def main(frames: int = 30) -> tuple[SAGE, list[list[dict]], list[list[dict]]]:
    torch.manual_seed(0)
    model = SAGE(SIZES, dim=32)  # a trained one: sage_ext.training.Run.load("RUN").model
    listener = await asyncio.start_server(Server(model).serve, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    sent = [[{n: torch.randn(d).tolist() for n, d in SIZES.items()} for _ in range(frames)] for _ in range(2)]
    for frame in sent[1][10:20]:
        frame["visual"] = None  # the second client's camera is covered for a while
    answers = await asyncio.gather(*(client(port, one) for one in sent))
    listener.close()
    for number, one in enumerate(answers):
        print(
            f"client {number}: {len(one)} estimates, the last one {one[-1]['estimate']}, weights {one[-1]['weights']}"
        )
    return model, sent, answers


if __name__ == "__main__":
    asyncio.run(main())
