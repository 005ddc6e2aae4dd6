"""Writes the tables of docs/conformance.md from the suite itself.

    python tools/conformance_tables.py
    python tools/conformance_tables.py --examine SETTINGS REPORT.json

The first form launches the engines that CI runs (on the CPU; missing environments are made first), makes all checks on
each, writes the reports to docs/reports/CPU, and replaces the tables between the page's markers. Every report under
docs/reports/DEVICE becomes a column.

The second form launches one engine with a tiny model whose heads suit GPU kernels, and writes its report, as `millrace
doctor --json` prints it. SETTINGS are the settings of `engine` as JSON.
"""

import asyncio
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter

from millrace.config.engines import EmbeddedEngineConfig, EngineConfig, SGLangEngineConfig, VLLMEngineConfig
from millrace.config.sources import TinyModelConfig
from millrace.conformance import CHECKS, Outcome, Runner, Subject
from millrace.conformance.report import Report, capability_table, check_table, from_json, report, to_json
from millrace.engines import environments
from millrace.engines.spec import LaunchSpec
from millrace.engines.start import start
from millrace.train.tiny import make_tiny_model

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = DOCS / "conformance.md"
REPORTS = DOCS / "reports"
SGLANG_VERSIONS = ("0.5.23", "0.5.15")
VLLM_VERSION = "0.32.0"
START_TIMEOUT = 240.0


def sglang(version: str) -> EngineConfig:
    environment = environments.install(
        "sglang", version, "cpu", python=sys.executable, progress=lambda what, *_: print(what, flush=True)
    )
    return SGLangEngineConfig(
        kind="sglang", version=version, device="cpu", python=environment.python, threads=1, start_timeout=START_TIMEOUT
    )


def vllm() -> EngineConfig:
    environment = environments.install(
        "vllm", VLLM_VERSION, "cpu", python=sys.executable, progress=lambda what, *_: print(what, flush=True)
    )
    return VLLMEngineConfig(
        kind="vllm",
        version=VLLM_VERSION,
        device="cpu",
        python=environment.python,
        threads=1,
        start_timeout=START_TIMEOUT,
    )


async def examine(config: EngineConfig, model: Path, other: Path, logs: Path) -> Report:
    started = await start(config, LaunchSpec(model_path=model, log_dir=logs))
    assert started.process is not None
    try:
        runner = Runner(Subject(started.engine, started.info, model, other))
        results = []
        async for result in runner.run(CHECKS):
            print(f"{config.kind}: {result.check} {result.outcome} {result.reason}", flush=True)
            results.append(result)
        return report(started.info, results, runner.lost)
    finally:
        await started.end()


def replace_between(page: str, name: str, table: str) -> str:
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    if not after:
        raise SystemExit(f"{PAGE} has no {begin} ... {end}")
    return f"{before}{begin}\n{table}\n{end}{after}"


def examine_all(configs: Sequence[EngineConfig], hidden_size: int) -> list[Report]:
    reports = []
    with tempfile.TemporaryDirectory() as folder:
        model, other = Path(folder) / "model", Path(folder) / "other"
        for seed, path in enumerate((model, other)):
            make_tiny_model(TinyModelConfig(kind="tiny", hidden_size=hidden_size, heads=hidden_size // 32), seed, path)
        for config in configs:
            one = asyncio.run(examine(config, model, other, Path(folder) / "logs"))
            counts = ", ".join(f"{one.count(outcome)} {outcome}" for outcome in Outcome)
            print(f"{one.title}: {counts}, in {one.seconds:.1f} s", flush=True)
            for result in one.results:
                if result.outcome is not Outcome.PASSED:
                    print(f"  {result.check} {result.outcome}: {result.reason}", flush=True)
            reports.append(one)
    return reports


def main() -> None:
    if sys.argv[1:2] == ["--examine"]:
        config: EngineConfig = TypeAdapter(EngineConfig).validate_python(json.loads(sys.argv[2]))
        (one,) = examine_all([config], hidden_size=256)
        Path(sys.argv[3]).write_bytes(to_json(one))
        return
    configs = EmbeddedEngineConfig(kind="embedded", threads=1), *map(sglang, SGLANG_VERSIONS), vllm()
    found = examine_all(configs, hidden_size=64)
    (REPORTS / "CPU").mkdir(parents=True, exist_ok=True)
    for path in (REPORTS / "CPU").iterdir():
        path.unlink()  # a version that is no longer examined has no column
    for one in found:
        (REPORTS / "CPU" / f"{one.kind}-{one.engine_version}.json").write_bytes(to_json(one))
    reports = {
        f"{one.title}, {path.parent.name}": one
        for path in sorted(REPORTS.glob("*/*.json"))
        for one in (from_json(path),)
    }
    page = replace_between(PAGE.read_text(), "capabilities", capability_table(reports))
    PAGE.write_text(replace_between(page, "checks", check_table(CHECKS, reports)))


if __name__ == "__main__":
    main()
