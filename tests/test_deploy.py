"""The manifests in deploy/ have KubeRay's fields, and run a stage that is there and valid."""

from __future__ import annotations

import math
import shlex
from pathlib import PurePosixPath
from typing import Any

import pytest
import yaml

from shardferry.schemas import StageConfig
from tests.support.commands import REPOSITORY

MANIFESTS = sorted((REPOSITORY / "deploy").glob("*.yaml"))

# Of the custom resources ray.io/v1, as of KubeRay 1.7.0.
_FIELDS = yaml.safe_load("""
job: [activeDeadlineSeconds, backoffLimit, clusterSelector, deletionStrategy, entrypoint, entrypointNumCpus, entrypointNumGpus,
  entrypointResources, jobId, managedBy, metadata, preRunningDeadlineSeconds, rayClusterSpec, runtimeEnvYAML,
  shutdownAfterJobFinishes, submissionMode, submitterConfig, submitterPodTemplate, suspend, ttlSecondsAfterFinished]
cluster: [authOptions, autoscalerOptions, enableInTreeAutoscaling, gcsFaultToleranceOptions, headGroupSpec, rayVersion,
  headServiceAnnotations, historyServerOptions, managedBy, networkPolicy, suspend, tlsOptions, upgradeStrategy, workerGroupSpecs]
head: [enableIngress, headService, ingressOptions, labels, rayStartParams, resources, serviceType, template]
workers: [groupName, idleTimeoutSeconds, labels, maxReplicas, minReplicas, numOfHosts, priority, rayStartParams, replicas,
  resources, scaleStrategy, suspend, template]
""")
_ONLY_WITH_ITS_OWN_CLUSTER = {"backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "suspend"}


def documents(kind: str) -> dict[str, dict[str, Any]]:
    """By name."""
    everything = [d for path in MANIFESTS for d in yaml.safe_load_all(path.read_text(encoding="utf-8"))]
    return {document["metadata"]["name"]: document for document in everything if document["kind"] == kind}


def cluster_of(job: dict[str, Any]) -> dict[str, Any]:
    """Its own cluster, or the one that it selects."""
    own = job["spec"].get("rayClusterSpec")
    return own or documents("RayCluster")[job["spec"]["clusterSelector"]["ray.io/cluster"]]["spec"]


JOBS = pytest.mark.parametrize("job", list(documents("RayJob").values()), ids=list(documents("RayJob")))


@JOBS
def test_fields_are_kuberays(job: dict[str, Any]) -> None:
    cluster = cluster_of(job)
    assert set(job["spec"]) <= set(_FIELDS["job"])
    assert set(cluster) <= set(_FIELDS["cluster"])
    assert set(cluster["headGroupSpec"]) <= set(_FIELDS["head"])
    assert all(set(group) <= set(_FIELDS["workers"]) for group in cluster["workerGroupSpecs"])
    if "clusterSelector" in job["spec"]:
        assert not _ONLY_WITH_ITS_OWN_CLUSTER & set(job["spec"])


@JOBS
def test_a_job_runs_a_valid_stage_on_as_many_gpus(job: dict[str, Any]) -> None:
    """The head, which runs the driver, has the spec where the entrypoint looks for it."""
    program, command, spec, *_ = shlex.split(job["spec"]["entrypoint"])
    assert (program, command) == ("shardferry", "run")
    cluster = cluster_of(job)
    pod = cluster["headGroupSpec"]["template"]["spec"]
    path = PurePosixPath(spec)
    mount = next(m for m in pod["containers"][0]["volumeMounts"] if m["mountPath"] == str(path.parent))
    volume = next(v for v in pod["volumes"] if v["name"] == mount["name"])
    files = documents("ConfigMap")[volume["configMap"]["name"]]["data"]
    config = StageConfig.model_validate(yaml.safe_load(files[path.name]))
    groups = cluster["workerGroupSpecs"]
    gpus = [int(g["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]) for g in groups]
    assert config.topology is not None
    assert sum(n * g["replicas"] for n, g in zip(gpus, groups, strict=True)) == math.prod(config.topology.mesh.values())
