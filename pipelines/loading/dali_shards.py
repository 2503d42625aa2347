"""The DALI loader over web shards, in the order of DALI's own reader.

    archives ──▶ blocks of images in a row, shuffled every epoch ──▶ one part for each rank
             ──▶ DALI's buffer of SHUFFLED images, from which it draws ──▶ batches

A deviation from the paper: an epoch's order is not a uniform permutation but the above, which reads
shards in long pieces. Up to SHUFFLED images a rank it is uniform. The order is a function of (seed,
epoch, number of ranks); every image is drawn once an epoch but for the tail, which is dropped.
Shards are sorted by class, so the blocks matter: DALI is given every archive many times, each time
with an index of one block.

Which image it drew DALI says by the name of its file, the image's number. Keys and boxes are thus
those that the native loader gives to the same image in the same epoch.

A checkpoint keeps DALI's own state of the reader, of every rank. Without one that fits, the epoch's
part before the step is read and passed over.
"""

import base64
import json
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from pipelines.crop import RandomResizedCrop
from pipelines.loading.dali import DaliLoader, in_short
from pipelines.loading.sampler import Steps
from pipelines.order import epoch_order, view_keys
from pipelines.webdataset.reader import ShardReader

SHUFFLED = 16_384  # images in a rank's buffer
MAX_BLOCKS = 8_192  # of the data: DALI maps each into memory, and a process has 65,530 maps
MIN_BLOCK = 64  # images: 7 MB of ImageNet in a row
READ_AHEAD = 3  # batches
KEPT_STATES = 64  # of the last steps; more than batches are on their way to the encoder
_READER = 3  # in the place of a view's number (0 and 1 pretraining's, 2 evaluation's)


class ShardLoader(DaliLoader):
    """DaliLoader's batches from a folder of web shards."""

    def __init__(
        self,
        reader: ShardReader,
        crop: RandomResizedCrop,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        size_of: Callable[[int], int] | None = None,
        **settings,
    ) -> None:
        shared = {"batch_size": batch_size, "rank": rank, "world_size": world_size}
        super().__init__(reader, crop, **shared, **settings)  # type: ignore[arg-type]
        steps = ShardSteps(reader, crop, **shared, seed=seed, size_of=size_of)
        self.steps, self.cutter.source = steps, steps.drawn.popleft


class ShardSteps(Steps):
    """Steps in the order in which DALI's reader draws the images.

    Attributes: `drawn`, the bytes of the images of every step that was handed out.
    """

    def __init__(self, reader: ShardReader, crop, *, rank: int, world_size: int, **settings):
        settings |= {"rank": rank, "world_size": world_size}
        super().__init__(reader, crop, **settings)  # type: ignore[arg-type]
        self.reader, self.rank, self.world_size = reader, rank, world_size
        self.drawn: deque[list[np.ndarray]] = deque()
        self._states: deque[tuple[int, str]] = deque(maxlen=KEPT_STATES)  # (step, what DALI saved)

    def samples(self, first_step: int, last_step: int) -> Iterator[tuple[int, np.ndarray]]:
        """(step, this rank's samples int64 [n]) of every step, as DALI reads them."""
        self.drawn.clear()  # of a loop that was left early
        saved = dict(self._states).get(first_step)
        for step in range(first_step, last_step):
            epoch, passed = divmod(step, self.per_epoch)
            if step == first_step or passed == 0:
                pipeline = self._open(epoch, saved)
                for _ in range(0 if saved else passed):
                    self._read(pipeline)
                saved = None
            images = self._read(pipeline)
            files = [image.source_info().rpartition(":")[2] for image in images]
            self.drawn.append([np.asarray(image) for image in images])
            self._states.append((step + 1, base64.b64encode(pipeline.checkpoint()).decode()))
            yield step, np.array([int(file.partition(".")[0]) for file in files])

    def state(self, step: int) -> str:
        """DALI's state of the reader, and where it fits; empty at the start of an epoch."""
        saved = dict(self._states).get(step)
        return json.dumps([*self._fits(), step, saved]) if step % self.per_epoch else ""

    def restore(self, states: list[str]) -> str:
        """Begin with this rank's, if they fit; else what is left of the epoch may be other images.

        Another number of ranks orders an epoch otherwise, and another DALI may.
        """
        if not any(states):  # the end of an epoch
            return ""
        own = states[self.rank] if len(states) == self.world_size else ""
        *fits, step, saved = json.loads(own) if own else (0, "")
        if fits != self._fits() or not saved:
            return (
                "the run stopped in the middle of an epoch with another number of ranks or another"
                " DALI: the rest of this epoch may repeat images and leave others out"
            )
        self._states.append((step, saved))
        return ""

    def _read(self, pipeline) -> list:
        (images,) = self._done(pipeline.run)
        return list(images)

    def _done(self, call: Callable):
        """What DALI answers. Raises ValueError for its errors, in one line."""
        try:
            return call()
        except RuntimeError as error:
            raise ValueError(
                f"{self.reader.path}: DALI does not read it ({in_short(error)}); convert it:"
                f" bt-convert {self.reader.path} out.beton"
            ) from None

    def _fits(self) -> list:
        import nvidia.dali

        return [nvidia.dali.__version__, self.rank, self.world_size]

    def _open(self, epoch: int, saved: str | None):
        """DALI's reader of this rank's part of an epoch, at its start or as it was saved."""
        # The files of indices are there while DALI reads them: a kill leaves none behind.
        with tempfile.TemporaryDirectory(prefix="bt-fast-") as folder:
            blocks = list(_write_blocks(self.reader, Path(folder)))
            order = epoch_order(len(blocks), self.seed, epoch)
            return self._build([blocks[block] for block in order], epoch, saved)

    def _build(self, blocks: list[tuple[str, str]], epoch: int, saved: str | None):
        """The reader of (archive, index) in this order."""
        from nvidia.dali import Pipeline, fn

        archives, indices = zip(*blocks, strict=True)
        (key,) = view_keys(np.array([self.rank]), seed=self.seed, epoch=epoch, view=_READER)
        pipeline = Pipeline(
            batch_size=self.share.stop - self.share.start,
            num_threads=1,
            device_id=None,
            prefetch_queue_depth=READ_AHEAD,
            enable_checkpointing=True,
            checkpoint=base64.b64decode(saved) if saved else None,
        )
        with pipeline:
            images = fn.readers.webdataset(
                paths=list(archives),
                index_paths=list(indices),
                ext=["jpg"],
                missing_component_behavior="error",
                random_shuffle=True,
                initial_fill=min(SHUFFLED, len(self.reader) // self.world_size),
                seed=int(key >> np.uint64(33)),
                shard_id=self.rank,
                num_shards=self.world_size,
            )
            pipeline.set_outputs(images)
        self._done(pipeline.build)
        return pipeline


def _write_blocks(reader: ShardReader, folder: Path) -> Iterator[tuple[str, str]]:
    """Write an index of every block; yields (archive, index)."""
    length = max(MIN_BLOCK, -(-len(reader) // max(MAX_BLOCKS - len(reader.archives), 1)))
    for archive, start, end in zip(
        reader.archives, reader.first[:-1].tolist(), reader.first[1:].tolist(), strict=True
    ):
        for first in range(start, end, length):
            rows = enumerate(reader.places[first : min(first + length, end)].tolist(), first)
            lines = [
                f"jpg {position} {size} {number:09}.jpg\n" for number, (position, size) in rows
            ]
            index = folder / f"{first}.idx"
            index.write_text(f"v1.2 {len(lines)}\n" + "".join(lines))
            yield str(archive), str(index)
