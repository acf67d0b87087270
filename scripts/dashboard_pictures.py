"""Make the dashboard's pictures: `python scripts/dashboard_pictures.py [--to DIR] [--all]`.

Serves the digits example with small windows, sends clean digits, then mirrored ones, and takes a picture of the page after each.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from headrace.app import Server
from headrace.config import ServerConfig

from scripts.browser import Page, open_browser

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = "\n[drift]\nlearn_rows = 2000\nwindow_rows = 1000\n"
SIZES = (("desktop", 1440, 1000), ("tablet", 900, 1000), ("phone", 390, 844))


async def send(address: str, images: Any, seconds: float, seed: int) -> None:
    """Requests of one to eight random rows on a few connections, some 300 a second."""
    import tritonclient.grpc.aio as client

    random = np.random.default_rng(seed)
    end = asyncio.get_running_loop().time() + seconds

    async def one_after_the_other(stub: client.InferenceServerClient) -> None:
        while asyncio.get_running_loop().time() < end:
            rows = images[random.integers(0, len(images), random.integers(1, 9))]
            tensor = client.InferInput("image", list(rows.shape), "FP32")
            tensor.set_data_from_numpy(rows)
            await stub.infer("digits", [tensor])
            await asyncio.sleep(random.exponential(0.02))

    async with client.InferenceServerClient(address) as stub:
        await asyncio.gather(*[one_after_the_other(stub) for _ in range(8)])


def shrink(picture: bytes) -> bytes:
    """In 256 colours: a third of the bytes, and nobody sees it of a page that has few."""
    from PIL import Image

    small = io.BytesIO()
    Image.open(io.BytesIO(picture)).convert("RGB").quantize(256).save(small, "PNG", optimize=True)
    return small.getvalue()


async def take(page: Page, directory: Path, name: str, *, is_all: bool) -> None:
    if not is_all:
        await page.resize(1440, 1000)
        await asyncio.sleep(1.5)
        (directory / f"dashboard-{name}.png").write_bytes(shrink(await page.picture(is_whole=True)))
        return
    for size, width, height in SIZES:
        for is_dark in (False, True):
            await page.resize(width, height, is_dark=is_dark)
            await asyncio.sleep(1.5)
            scheme = "dark" if is_dark else "light"
            (directory / f"dashboard-{name}-{size}-{scheme}.png").write_bytes(await page.picture(is_whole=True))


async def main(directory: Path, *, is_all: bool) -> None:
    from sklearn.datasets import load_digits

    clean = load_digits().data.astype(np.float32)
    with tempfile.TemporaryDirectory() as place:
        # The page shows where models are from: not a name made up for this.
        os.chdir(place)
        repository = "models"
        shutil.copytree(ROOT / "examples" / "models" / "diabetes", Path(repository) / "diabetes")
        shutil.copytree(ROOT / "examples" / "models" / "digits", Path(repository) / "digits")
        settings = Path(repository) / "digits" / "model.toml"
        settings.write_text(settings.read_text() + SETTINGS)
        server = Server(ServerConfig(models=(repository,), grpc=("127.0.0.1:0",), http="127.0.0.1:0"))
        await server.start()
        try:
            async with open_browser(f"http://{server.http_address}/#digits:1") as page:
                await page.resize(1440, 1000)
                for name, images, seed in (("before", clean, 0), ("after", np.ascontiguousarray(clean[:, ::-1]), 1)):
                    sending = asyncio.create_task(send(server.grpc_addresses[0], images, 30, seed))
                    await asyncio.sleep(20)
                    await take(page, directory, name, is_all=is_all)
                    await sending
                print(*page.problems, sep="\n")
        finally:
            await server.stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, default=ROOT / "docs" / "drift")
    parser.add_argument("--all", action="store_true", help="desktop and phone, light and dark")
    arguments = parser.parse_args()
    asyncio.run(main(arguments.to.resolve(), is_all=arguments.all))
