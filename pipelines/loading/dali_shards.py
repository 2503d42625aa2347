"""Sampler for web shards: the order is that of DALI's own reader, which reads long pieces.

    archives ──▶ blocks of consecutive images, shuffled every epoch ──▶ one part for each rank
             ──▶ DALI's shuffle buffer, from which it draws ──▶ batches

A deviation from the paper: an epoch's order is not a uniform permutation but the above. Up to
SHUFFLE_BUFFER_SIZE images per rank it is uniform. The order is a function of (seed, epoch, number
of ranks); every image is drawn once an epoch except for the tail, which is dropped. Shards are
sorted by class, so the blocks matter: DALI is given every archive many times, each time with an
index of one block.

DALI returns the name of the file it drew, which is the image's index. Keys and boxes are thus those
of the same image in the same epoch with any other loader.

A checkpoint keeps the state of DALI's reader of every rank. Without one that fits, the part of the
epoch before the step is read and discarded.
"""

import base64
import json
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.crop import RandomResizedCrop
from pipelines.loading.dali import short_message
from pipelines.loading.loader import Sampler
from pipelines.order import epoch_order, view_keys
from pipelines.webdataset.reader import ShardReader

SHUFFLE_BUFFER_SIZE = 16_384  # images in a rank's buffer
MAX_BLOCKS = 8_192  # per data set: DALI maps each into memory, and a process has 65,530 maps
MIN_BLOCK = 64  # images: 7 MB of ImageNet in one read
NUM_BATCHES_AHEAD = 3
KEPT_STATES = 64  # of the last steps; more than the batches that are loaded ahead of the encoder
_READER_VIEW = 3  # in place of a view's number: 0 and 1 are pretraining's, 2 is evaluation's


class ShardSampler(Sampler):
    """Requests in the order in which DALI's reader draws the images, whose bytes come with them."""

    def __init__(self, dataset: ShardReader, crop: RandomResizedCrop, **settings: Any) -> None:
        super().__init__(dataset, crop, **settings)
        self.shards = dataset
        self._states: deque[tuple[int, str]] = deque(maxlen=KEPT_STATES)  # (step, DALI's state)

    def samples(
        self, first_step: int, last_step: int
    ) -> Iterator[tuple[int, np.ndarray, list[np.ndarray] | None]]:
        """(step, this rank's indices int64 [n], encoded images) of these steps, as DALI reads."""
        saved = dict(self._states).get(first_step)
        for step in range(first_step, last_step):
            epoch, num_before = divmod(step, self.steps_per_epoch)
            if step == first_step or num_before == 0:
                pipeline = self._open(epoch, saved)
                for _ in range(0 if saved else num_before):
                    self._read(pipeline)
                saved = None
            images = self._read(pipeline)
            files = [image.source_info().rpartition(":")[2] for image in images]
            self._states.append((step + 1, base64.b64encode(pipeline.checkpoint()).decode()))
            samples = np.array([int(file.partition(".")[0]) for file in files])
            yield step, samples, [np.asarray(image) for image in images]

    def state(self, step: int) -> str:
        """State of DALI's reader with the versions it fits; empty at the start of an epoch."""
        saved = dict(self._states).get(step)
        return json.dumps([*self._version(), step, saved]) if step % self.steps_per_epoch else ""

    def restore(self, states: list[str]) -> str:
        """Continue from this rank's state if it fits; else return a warning."""
        if not any(states):  # the end of an epoch
            return ""
        state = states[self.rank] if len(states) == self.world_size else ""
        *version, step, saved = json.loads(state) if state else (0, "")
        if version != self._version() or not saved:
            return (
                "the run stopped in the middle of an epoch with another number of ranks or another"
                " DALI: the rest of this epoch may repeat images and leave others out"
            )
        self._states.append((step, saved))
        return ""

    def _read(self, pipeline) -> list:
        (images,) = self._call(pipeline.run)
        return list(images)

    def _call(self, function: Callable):
        """The result of a call to DALI. Raises ValueError for its errors, in one line."""
        try:
            return function()
        except RuntimeError as error:
            raise ValueError(
                f"{self.shards.path}: DALI does not read it ({short_message(error)}); convert it:"
                f" bt-convert {self.shards.path} out.beton"
            ) from None

    def _version(self) -> list:
        import nvidia.dali

        return [nvidia.dali.__version__, self.rank, self.world_size]

    def _open(self, epoch: int, saved: str | None):
        """DALI's reader of this rank's part of an epoch, at its start or in a saved state."""
        from nvidia.dali import Pipeline, fn

        (key,) = view_keys(np.array([self.rank]), seed=self.seed, epoch=epoch, view=_READER_VIEW)
        pipeline = Pipeline(
            batch_size=self.local_batch_size,
            num_threads=1,
            device_id=None,
            prefetch_queue_depth=NUM_BATCHES_AHEAD,
            enable_checkpointing=True,
            checkpoint=base64.b64decode(saved) if saved else None,
        )
        # The index files exist while DALI reads them: a kill leaves none behind.
        with tempfile.TemporaryDirectory(prefix="bt-fast-") as folder:
            blocks = list(_write_blocks(self.shards, Path(folder)))
            order = epoch_order(len(blocks), self.seed, epoch)
            archives, indices = zip(*(blocks[block] for block in order), strict=True)
            with pipeline:
                images = fn.readers.webdataset(
                    paths=list(archives),
                    index_paths=list(indices),
                    ext=["jpg"],
                    missing_component_behavior="error",
                    random_shuffle=True,
                    initial_fill=min(SHUFFLE_BUFFER_SIZE, len(self.shards) // self.world_size),
                    seed=int(key >> np.uint64(33)),
                    shard_id=self.rank,
                    num_shards=self.world_size,
                )
                pipeline.set_outputs(images)
            self._call(pipeline.build)
        return pipeline


def _write_blocks(reader: ShardReader, folder: Path) -> Iterator[tuple[str, str]]:
    """Write an index of every block of images; yields (archive, index)."""
    length = max(MIN_BLOCK, -(-len(reader) // max(MAX_BLOCKS - len(reader.archives), 1)))
    for archive, start, end in zip(
        reader.archives, reader.first[:-1].tolist(), reader.first[1:].tolist(), strict=True
    ):
        for first in range(start, end, length):
            rows = enumerate(reader.locations[first : min(first + length, end)].tolist(), first)
            lines = [
                f"jpg {position} {size} {number:09}.jpg\n" for number, (position, size) in rows
            ]
            index = folder / f"{first}.idx"
            index.write_text(f"v1.2 {len(lines)}\n" + "".join(lines))
            yield str(archive), str(index)
