"""What a Slurm job has, as scontrol prints it, and which of its nodes take an engine."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.launch.base import Need
from millrace.launch.slurm.job import DRAINING, Job, JobNode, movable, parse, possible, ranked, room, with_step
from millrace.launch.slurm.step import command, environment

EIGHT = JobNode("a", cpus=32, gpus=8)


@pytest.mark.parametrize(
    ("line", "nodes"),
    [
        ("NumNodes=2 NumCPUs=4 Nodes=n[1-2] CPU_IDs=0-1 Mem=0 GRES=gpu:2(IDX:0-1) MinCPUsNode=2", [("n[1-2]", 2, 2)]),
        ("Nodes=n1 CPU_IDs=0 Mem=2000 GRES= MinCPUsNode=1", [("n1", 1, 0)]),
        (
            "Nodes=gpu1 CPU_IDs=0-15,32-47 Mem=9 GRES=gpu:a100:4(IDX:0,2,5-6),nic:1(IDX:0) Nodes=gpu[2,7-8] "
            "CPU_IDs=3 Mem=9 GRES=gpu:a100:1(IDX:3),gpu:h100:2(CNT:2)",
            [("gpu1", 32, 4), ("gpu[2,7-8]", 1, 3)],
        ),
    ],
)
def test_the_nodes_of_a_job_are_read(line: str, nodes: list[tuple[str, int, int]]) -> None:
    fields, found = parse(f"JobId=7 HetJobId=5 JobState=RUNNING {line}")
    assert found == nodes
    assert (fields["JobId"], fields["HetJobId"], fields["JobState"]) == ("7", "5", "RUNNING")


def test_a_step_has_the_share_of_the_cpus_that_it_has_of_the_gpus() -> None:
    assert EIGHT.step_of(Need(gpus=2, cpus=1)) == Need(2, 8)
    assert EIGHT.step_of(Need(gpus=2, cpus=12)) == Need(2, 12)
    assert EIGHT.step_of(Need(gpus=0, cpus=3)) == Need(0, 3)


def test_engines_are_spread_and_the_nodes_of_one_are_packed() -> None:
    job = Job(1, (EIGHT, JobNode("b", 32, 8), JobNode("c", 32, 4)))
    need, used = Need(2, 1), dict[str, Need]()
    chosen = []
    for _ in range(4):
        node = ranked(job, need, used, ())[0]
        chosen.append(node.name)
        used = with_step(used, node, need)
    assert chosen == ["a", "b", "a", "b"]
    assert ranked(job, need, used, near=["c"])[0].name == "c"


@given(
    st.lists(st.tuples(st.integers(1, 64), st.integers(0, 8)), min_size=1, max_size=5),
    st.lists(st.tuples(st.integers(0, 8), st.integers(1, 16)), max_size=20),
)
def test_no_node_is_given_more_than_it_has(sizes: list[tuple[int, int]], needs: list[tuple[int, int]]) -> None:
    job = Job(1, tuple(JobNode(f"n{index}", cpus, gpus) for index, (cpus, gpus) in enumerate(sizes)))
    used = dict[str, Need]()
    for gpus, cpus in needs:
        need = Need(gpus, cpus)
        fitting = ranked(job, need, used, ())
        assert {node.name for node in fitting} == {node.name for node in job.nodes if room(node, need, used)}
        if not used:
            assert bool(fitting) == possible(job, need, 1)
        if fitting:
            used = with_step(used, fitting[0], need)
    for node in job.nodes:
        taken = used.get(node.name, Need(0, 0))
        assert taken.gpus <= node.gpus
        assert taken.cpus <= node.cpus


STATES = """\
NodeName=n1 Arch=x86_64 Gres=gpu:2 NodeAddr=10.0.0.1 State=MIXED+DRAIN ThreadsPerCore=1 Reason=State=IDLE
NodeName=n2 Arch=x86_64 Gres=gpu:2 NodeAddr=10.0.0.2 State=ALLOCATED ThreadsPerCore=1
NodeName=n3 Arch=x86_64 Gres=gpu:2 NodeAddr=10.0.0.3 State=IDLE*+DRAIN+REBOOT_REQUESTED ThreadsPerCore=1
NodeName=n4 Arch=x86_64 Gres=gpu:2 NodeAddr=10.0.0.4 State=ALLOCATED+FAIL ThreadsPerCore=1
NodeName=n5 Arch=x86_64 Gres=gpu:2 NodeAddr=10.0.0.5 State=MIXED ThreadsPerCore=1 Reason=DRAIN it soon
"""


def test_the_nodes_that_drain_or_fail_are_read() -> None:
    assert DRAINING.findall(STATES) == ["n1", "n3", "n4"]


def test_only_engines_with_room_elsewhere_can_move() -> None:
    job = Job(1, (JobNode("a", 4, 4), JobNode("b", 4, 4), JobNode("c", 4, 4)))
    a, b, c = job.nodes
    two = Need(2, 1)
    assert movable(job, {"a"}, {1: [(a, two)], 2: [(b, two)]}) == [1]
    assert movable(job, set(), {1: [(a, two)]}) == []
    assert movable(job, {"a", "b", "c"}, {1: [(a, two)]}) == []
    full = {1: [(a, two)], 2: [(a, two)], 3: [(b, Need(4, 1))], 4: [(c, two)]}
    assert movable(job, {"a"}, full) == [1]  # both fit alone, and not together
    over = {1: [(a, Need(4, 1)), (b, Need(4, 1))], 2: [(c, Need(1, 1))]}
    assert movable(job, {"a"}, over) == []
    assert movable(job, {"a"}, {1: over[1]}) == [1]  # its own place on b is free when it has left


@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(0, 4)), min_size=1, max_size=6),
    st.sets(st.sampled_from("abcd"), max_size=3),
)
def test_the_engines_that_can_move_fit_together(asked: list[tuple[int, int]], leaving: set[str]) -> None:
    """In engines of one node: they fit on the nodes that stay, beside the engines there."""
    job, used = Job(1, tuple(JobNode(name, 8, 4) for name in "abcd")), dict[str, Need]()
    engines = dict[int, list[tuple[JobNode, Need]]]()
    for number, (cpus, gpus) in enumerate(asked):
        need = Need(gpus, cpus)
        for node in ranked(job, need, used, ())[:1]:
            engines[number] = [(node, need)]
            used = with_step(used, node, need)
    moved = movable(job, leaving, engines)
    assert all(engines[number][0][0].name in leaving for number in moved)
    after = {name: its for name, its in used.items() if name not in leaving}
    for number in moved:
        (node,) = ranked(job.without(leaving), engines[number][0][1], after, ())[:1]
        after = with_step(after, node, engines[number][0][1])


def test_srun_gets_all_options_of_a_step_and_none_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    words = command(Job(7, (EIGHT,)), JobNode("a", 32, 8, group=1), Need(2, 1), "sglang-0")
    for option in ("--jobid=7", "--het-group=1", "--nodelist=a", "--exact", "--gres=gpu:2", "--cpus-per-task=8"):
        assert option in words
    assert "--gres=none" in command(Job(7, (EIGHT,)), EIGHT, Need(0, 1), "embedded-0")
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "4000")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    kept = {name for name in environment() if name.startswith("SLURM_")}
    assert kept == {"SLURM_CONF"}
