"""One step of a TensorRT engine: shapes, addresses, chunks. Knows neither TensorRT nor CUDA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from mla_deploy.errors import SessionError
from mla_deploy.manifest import Manifest, ProfileInfo
from mla_deploy.runtime import _runtime
from mla_deploy.runtime.cancellation import CancelledError
from mla_deploy.runtime.native import Logits
from mla_deploy.runtime.tensorrt_cache import Cache, Device, Place
from mla_deploy.runtime.tensorrt_pages import PageCache
from mla_deploy.runtime.tensorrt_rows import RowCache


class Execution(Protocol):
    """An engine with its two profiles."""

    def use_profile(self, index: int) -> None:
        """Choose the profile of the steps that follow."""

    def set_shape(self, name: str, shape: Sequence[int]) -> None:
        """The shape of an input."""

    def set_address(self, name: str, address: int) -> None:
        """Where an input or output lies on the GPU."""

    def run(self) -> None:
        """Put the step on the device's stream."""

    def close(self) -> None:
        """Free the engine."""


class TensorRtGraph:
    """Feeds an engine.

    Attributes:
        cache: of all sessions.
        capacity: tokens that it holds.
    """

    def __init__(
        self, manifest: Manifest, device: Device, execution: Execution, max_tokens: int | None
    ) -> None:
        assert manifest.tensorrt is not None
        self._profiles: list[ProfileInfo] = manifest.tensorrt.profiles
        self._device, self._execution = device, execution
        self._vocab_size = manifest.model.vocab_size
        page = manifest.cache.page_tokens
        most = self._profiles[0].rows[2]
        wanted = most if max_tokens is None else -(-max_tokens // page) * page
        self.capacity = min(most, wanted)
        self._chunk, self._most_logits = self._profiles[0].tokens[2], self._profiles[0].logits[2]
        self.cache: Cache = (
            PageCache(device, manifest.cache, self.capacity)
            if manifest.tensorrt.plugin
            else RowCache(device, manifest.cache, self.capacity, self._chunk)
        )
        self.bytes_per_token = self.cache.bytes_per_token
        self._ids = device.allocate(8 * self._chunk)
        self._past = device.allocate(8)
        self._index = device.allocate(8 * self._most_logits)
        self._logits = device.allocate(4 * self._most_logits * self._vocab_size)
        self._profile = -1
        self._addresses = self.cache.addresses() | {
            "input_ids": self._ids,
            "past_lengths": self._past,
            "logit_index": self._index,
            "logits": self._logits,
        }

    def append(
        self,
        place: Place,
        ids: Sequence[int],
        past: int,
        wanted: Sequence[int],
        cancellation: _runtime.Cancellation | None = None,
    ) -> Logits:
        """Append tokens behind the first `past` of a session.

        Args:
            place: of the session in the cache.
            wanted: positions in `ids`, rising, whose logits are wanted.
            cancellation: looked at before every chunk.

        Returns:
            logits [len(wanted), vocab_size].

        Raises:
            SessionError: the cache has no room for them.
            CancelledError: it was requested; the rows behind `past` are worth nothing then.
        """
        room = self.cache.room(place, past)
        if len(ids) > room:
            raise SessionError(
                "the cache is full",
                found=f"{len(ids)} new tokens after {past}",
                allowed=f"{room} new ones",
                hint="export with a larger --max-tokens, or rewind the session",
            )
        result = np.empty((len(wanted), self._vocab_size), dtype=np.float32)
        start, filled = 0, 0
        while start < len(ids):
            if cancellation is not None and cancellation.requested:
                raise CancelledError
            count = min(self._chunk, len(ids) - start)
            here = [at - start for at in wanted[filled:] if at < start + count]
            if len(here) > self._most_logits:  # a shorter step, so that all its logits fit
                here = here[: self._most_logits]
                count = here[-1] + 1
            rows = self._step(place, ids[start : start + count], past + start, here)
            result[filled : filled + len(here)] = rows[: len(here)]
            start, filled = start + count, filled + len(here)
        return result

    def _step(self, place: Place, ids: Sequence[int], past: int, wanted: Sequence[int]) -> Logits:
        """One run of the engine. At least one row of logits comes, also if none is wanted."""
        index = list(wanted) or [len(ids) - 1]
        profile = 1 if len(ids) == 1 else 0
        if profile != self._profile:
            self._execution.use_profile(profile)
            for name, address in self._addresses.items():
                self._execution.set_address(name, address)
            self._profile = profile
        for name, address, values in (
            ("input_ids", self._ids, ids),
            ("past_lengths", self._past, [past]),
            ("logit_index", self._index, index),
        ):
            array = np.array(values, dtype=np.int64)
            self._device.upload(address, array)
            self._execution.set_shape(name, (1,) if name == "past_lengths" else (1, len(array)))
        for name, shape in self.cache.shapes(past + len(ids)).items():
            self._execution.set_shape(name, shape)
        self.cache.before_step(place, past, len(ids))
        self._execution.run()
        self.cache.after_step(place, past, len(ids))
        logits = np.empty((len(index), self._vocab_size), dtype=np.float32)
        self._device.download(self._logits, logits)
        return logits

    def close(self) -> None:
        """Free the engine and all memory."""
        self._execution.close()
        self._device.close()
