"""The manifest of a Ray cluster on Kubernetes has the fields of KubeRay's RayCluster, and fits the docs."""

from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
# As in KubeRay's definition of ray.io/v1 RayCluster.
SPEC = {"rayVersion", "headGroupSpec", "workerGroupSpecs"}
HEAD = {"rayStartParams", "template"}
WORKERS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}


def test_the_manifest_is_a_ray_cluster_whose_pods_share_their_paths() -> None:
    manifest = yaml.safe_load((ROOT / "examples/kubernetes/raycluster.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayCluster")
    assert set(manifest["spec"]) == SPEC
    assert set(manifest["spec"]["headGroupSpec"]) == HEAD
    groups = manifest["spec"]["workerGroupSpecs"]
    assert all(set(group) == WORKERS for group in groups)
    head, *workers = [one["template"]["spec"] for one in (manifest["spec"]["headGroupSpec"], *groups)]
    assert workers
    for pod in workers:
        assert mounts(pod) == mounts(head)
        assert pod["containers"][0]["image"] == head["containers"][0]["image"]
        assert pod["containers"][0]["env"] == head["containers"][0]["env"]
    docs = (ROOT / "docs/clusters.md").read_text()
    assert f"ray.io/cluster={manifest['metadata']['name']}," in docs


def test_the_manifests_ray_is_the_one_that_is_tested() -> None:
    manifest = yaml.safe_load((ROOT / "examples/kubernetes/raycluster.yaml").read_text())
    assert f"ray=={manifest['spec']['rayVersion']}" in (ROOT / "constraints/ray.txt").read_text().splitlines()


def mounts(pod: dict[str, Any]) -> dict[str, str]:
    """The paths in the first container, and the volumes there. Each volume is one of the pod's."""
    found = {one["mountPath"]: one["name"] for one in pod["containers"][0]["volumeMounts"]}
    assert set(found.values()) == {volume["name"] for volume in pod["volumes"]}
    return found
