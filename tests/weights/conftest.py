import asyncio

import pytest

from millrace.config.engines import EngineConfig
from tests.weights.variants import Tokens, Variant, ask_servers, make_variants


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> list[Variant]:
    return make_variants(tmp_path_factory.mktemp("variants"), 2)


@pytest.fixture(scope="module")
def references(config: EngineConfig, variants: list[Variant], tmp_path_factory: pytest.TempPathFactory) -> list[Tokens]:
    """The tokens that engines of the module's config make with each variant."""
    return asyncio.run(ask_servers(config, variants, tmp_path_factory.mktemp("references")))
