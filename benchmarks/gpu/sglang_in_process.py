"""Does the work of throughput.py with sglang.Engine, in-process, and gathers all the answers on one caller.
throughput.py starts this script in the engine's interpreter."""

import asyncio
import json
import random
import statistics
import sys
import time


def main() -> None:
    import sglang

    settings, work = json.loads(sys.argv[1]), json.loads(sys.argv[2])
    engine = sglang.Engine(**settings)
    with open(f"{settings['model_path']}/config.json") as file:
        vocab_size = json.load(file)["vocab_size"]

    async def measure(width: int, label: str) -> float:
        draw = random.Random(label)
        queue = iter(range(work["requests"]))
        answers = []

        async def worker() -> None:
            for _ in queue:
                prompt = [draw.randrange(2, vocab_size) for _ in range(work["prompt_tokens"])]
                sampling = {"max_new_tokens": work["tokens"], "ignore_eos": True, "temperature": 1.0}
                answers.append(
                    await engine.async_generate(input_ids=prompt, sampling_params=sampling, return_logprob=True)
                )

        started = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(width)))
        seconds = time.perf_counter() - started
        return sum(len(answer["output_ids"]) for answer in answers) / seconds

    async def run() -> None:
        for width in work["in_flight"]:
            rates = []
            for repeat in range(work["repeats"] + 1):
                speed = await measure(width, f"{width}-{repeat}")
                if repeat:
                    rates.append(speed)
                    print(f"{width} in flight, sglang.Engine in-process: {speed:,.0f} tok/s", flush=True)
            print(
                f"{width} in flight, median of {work['repeats']}: in-process {statistics.median(rates):,.0f} tok/s",
                flush=True,
            )

    engine.loop.run_until_complete(run())
    engine.shutdown()


if __name__ == "__main__":
    main()
