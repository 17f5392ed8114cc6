"""Several images at once without blocking an event loop, each with a deadline.

python examples/async_images.py BUNDLE IMAGE...
"""

import asyncio
import sys
from pathlib import Path

from tilewright.runtime import Restorer, load, write_image

SECONDS = 600


async def restore(restorer: Restorer, places: asyncio.Semaphore, source: Path) -> None:
    async with places:
        ticket = restorer.submit(source)
        late = asyncio.get_running_loop().call_later(SECONDS, ticket.cancel)
        try:
            restored = await ticket
        finally:
            late.cancel()
            ticket.cancel()  # if the task is cancelled; one that has ended stays as it is
    target = source.with_name(f"{source.stem}-restored.png")
    await asyncio.to_thread(write_image, target, restored.image, icc=restored.icc, exif=restored.exif)
    print(f"{target}: {restored.seconds['total']:.1f} s")


async def main() -> None:
    with load(sys.argv[1]) as restorer:
        places = asyncio.Semaphore(2)  # images at once: each needs memory
        await asyncio.gather(*(restore(restorer, places, Path(name)) for name in sys.argv[2:]))


asyncio.run(main())
