"""The curves of a run as an image."""

import io
from collections.abc import Sequence

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from millrace.train.metrics import StepMetrics


def draw_curves(metrics: Sequence[StepMetrics], title: str) -> bytes:
    """Return a PNG of four plots: reward and accuracy, seconds by phase, the policy's figures, and the logprob gap."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    (learning, seconds), (policy, gap) = figure.subplots(2, 2)
    figure.suptitle(title)
    steps = [m for m in metrics if m.reward is not None]
    x = [m.step for m in steps]
    evaluated = [m for m in metrics if m.accuracy is not None]

    learning.plot(x, [m.reward for m in steps], label="reward (training samples)", color="tab:blue")
    learning.plot(
        [m.step for m in evaluated],
        [m.accuracy for m in evaluated],
        label="accuracy (held out, greedy)",
        color="tab:orange",
        marker="o",
    )
    for name in _parts(steps):
        learning.plot(x, [m.rewards.get(name) for m in steps], label=name, linestyle=":")
    low, high = learning.get_ylim()
    learning.set(xlabel="step", ylim=(min(0.0, low), max(1.02, high)), title="learning")
    _legend(learning, learning.lines)

    phases = {
        "rollout": [m.rollout_seconds for m in steps],
        "train": [m.train_seconds for m in steps],
        "publish": [m.publish_seconds for m in steps],
        "sleep and wake": [m.sleep_seconds for m in steps],
    }
    seconds.stackplot(x, list(phases.values()), labels=list(phases))
    seconds.set(xlabel="step", ylabel="seconds", title="where a step's time goes")
    _legend(seconds, seconds.collections)

    policy.plot(x, [m.kl for m in steps], label="KL (sampling policy to trained policy)", color="tab:green")
    policy.plot(x, [m.clip_fraction for m in steps], label="clip fraction", color="tab:red")
    policy.plot(x, [m.entropy for m in steps], label="entropy (nats)", color="tab:purple")
    policy.set(xlabel="step", title="policy")
    _legend(policy, policy.lines)

    gap.plot(x, [m.logprob_gap for m in steps], label="|engine's - trainer's logprob| (nats)", color="tab:brown")
    gap.set(xlabel="step", title="engine and trainer")
    staleness = gap.twinx()
    staleness.plot(x, [m.staleness for m in steps], label="staleness (versions)", color="tab:gray", linestyle="--")
    staleness.set_ylim(0, max([1.0, *((m.staleness or 0.0) * 1.2 for m in steps)]))
    _legend(gap, [*gap.lines, *staleness.lines])
    for axes in (learning, seconds, policy, gap):
        axes.grid(alpha=0.3)
    image = io.BytesIO()
    figure.savefig(image, dpi=110, format="png")
    return image.getvalue()


def _legend(axes: Axes, handles: Sequence[Artist]) -> None:
    """Put a legend below a plot, where it hides no line."""
    axes.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4, fontsize="small", frameon=False
    )


def _parts(steps: Sequence[StepMetrics]) -> list[str]:
    """Return the names of the rewards' parts; none if there is only one, which is the reward."""
    names = list(dict.fromkeys(name for m in steps for name in m.rewards))
    return names if len(names) > 1 else []
