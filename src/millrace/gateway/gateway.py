"""The gateway: episodes of agents on one fleet, and the keys by which requests find them."""

import hashlib
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from millrace.config.gateway import GatewayConfig
from millrace.errors import ConfigError, DataError
from millrace.fleet.client import FleetClient
from millrace.gateway.episode import Engines, Episode
from millrace.gateway.format import TurnFormat
from millrace.gateway.journal import SUFFIX, Journal, decoded, read_journals
from millrace.gateway.rules import NO_RULES, EpisodeRules
from millrace.gateway.samples import GatewaySample


@dataclass(frozen=True, slots=True)
class OpenEpisode:
    """An episode, and how an agent reaches it.

    base_url: for SDKs of OpenAI and of Anthropic; the episode's secret is in it, so agents may send any key. api_key:
    the same secret, for agents that talk to the gateway's own URL.
    """

    episode: Episode = field(repr=False)
    id: str
    base_url: str = field(repr=False)
    api_key: str = field(repr=False)

    @property
    def headers(self) -> dict[str, str]:
        """The header that carries the secret."""
        return {"Authorization": f"Bearer {self.api_key}"}

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables by which common agents and SDKs find the gateway."""
        return {
            "OPENAI_BASE_URL": f"{self.base_url}/v1",
            "OPENAI_API_BASE": f"{self.base_url}/v1",
            "OPENAI_API_KEY": self.api_key,
            "ANTHROPIC_BASE_URL": self.base_url,
            "ANTHROPIC_API_KEY": self.api_key,
        }

    def samples(self) -> list[GatewaySample]:
        """Return the episode's tokens as sequences to train on."""
        return self.episode.samples()

    async def finish(self, reward: float | None = None, parts: Mapping[str, float] | None = None) -> None:
        """Close the episode. Requests that still run are cancelled. Raises EpisodeClosed if it is closed."""
        await self.episode.close(reward, parts or {})


class Gateway:
    """The episodes on one fleet. `serve_gateway` makes one and serves it.

    url: where it is served; empty before.
    """

    def __init__(self, fleet: FleetClient, turns: TurnFormat, config: GatewayConfig) -> None:
        self.engines = Engines(fleet, turns, config)
        self.url = ""
        self.episodes: dict[str, Episode] = {}
        self._by_key: dict[bytes, Episode] = {}  # by the digest of the secret, so that no comparison tells about it
        self._digests: dict[str, bytes] = {}  # the other way round, by the episode's id
        self._folder = _made(config.folder)
        if self._folder is not None:
            self._restore(self._folder)

    def open_episode(self, metadata: Mapping[str, object] | None = None, rules: EpisodeRules = NO_RULES) -> OpenEpisode:
        """Open an episode. Raises ConfigError if its file can't be written."""
        episode_id, key = secrets.token_hex(8), secrets.token_urlsafe(24)
        journal = Journal(self._folder / f"{episode_id}{SUFFIX}" if self._folder else None)
        episode = Episode(episode_id, self.engines, dict(metadata or {}), time.time(), journal, rules=rules)
        digest = _digest(key)
        journal.opened(episode_id, digest.hex(), episode.metadata, episode.created)
        self._add(episode, digest)
        return OpenEpisode(episode, episode_id, f"{self.url}/e/{key}", key)

    @asynccontextmanager
    async def episode(
        self, metadata: Mapping[str, object] | None = None, rules: EpisodeRules = NO_RULES
    ) -> AsyncIterator[OpenEpisode]:
        """Open an episode for the block, and close it behind it, unless the block did.

        Example:

            async with gateway.episode() as episode:
                await run_agent(episode.base_url, episode.api_key)
            samples = episode.samples()
        """
        opened = self.open_episode(metadata, rules)
        try:
            yield opened
        finally:
            if not opened.episode.closed:
                await opened.finish()

    def find(self, key: str | None) -> Episode | None:
        """Return the episode of a secret."""
        return None if not key else self._by_key.get(_digest(key))

    async def delete(self, episode_id: str) -> bool:
        """Forget an episode and remove its file. Return whether there was one."""
        episode = self.episodes.pop(episode_id, None)
        if episode is None:
            return False
        del self._by_key[self._digests.pop(episode_id)]
        await episode.cancel()
        episode.journal.delete()
        return True

    async def close(self) -> None:
        """Cancel what runs. Open episodes stay open for the next gateway on the same folder."""
        for episode in self.episodes.values():
            await episode.cancel()

    def _add(self, episode: Episode, digest: bytes) -> None:
        self.episodes[episode.id] = self._by_key[digest] = episode
        self._digests[episode.id] = digest

    def _restore(self, folder: Path) -> None:
        for path, lines in read_journals(folder):
            try:
                first = lines[0]
                episode = Episode(first["episode"], self.engines, first["metadata"], first["created"], Journal(path))
                for line in lines[1:]:
                    _replay(episode, line)
                self._add(episode, bytes.fromhex(first["key"]))
            except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
                raise DataError(f"{path}: a line is damaged: {type(error).__name__}: {error}") from error


def _replay(episode: Episode, line: Mapping[str, Any]) -> None:
    if "node" in line:
        episode.tree.add(decoded(episode.tree, line))
    for number in line.get("delivered", ()):
        episode.tree.nodes[number].delivered = True
    if "closed" in line:
        episode.closed, episode.reward, episode.parts = True, line["reward"], line["parts"]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="replace")).digest()


def _made(folder: Path | None) -> Path | None:
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigError(f"gateway.folder: {folder} can't be made: {error.strerror}") from error
    return folder
