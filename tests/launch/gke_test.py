"""The JobSets of launch/ fit the schemas, start main.py's processes and restart where it helps."""

import math
import re
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from caprl_jax.parallel import processes

ROOT = Path(__file__).parents[2]
NAMES = ("gke_tpu", "gke_gpu")
ABORTED, KILLED = 134, 137  # a process that JAX, or the kernel, has ended


def read(name):
    """Returns (JobSet, the only Job in it, the pod's only container)."""
    jobset = yaml.safe_load((ROOT / "launch" / f"{name}.yaml").read_text())
    (job,) = jobset["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    return jobset, job, container


@pytest.mark.parametrize("name", NAMES)
def test_the_jobset_fits_its_schema(name):
    """The models of JobSet's API raise on wrong types and drop the fields that they don't know."""
    jobset, _, _ = read(name)
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and jobset["kind"] == "JobSet"
    assert JobsetV1alpha2JobSet.from_dict(jobset).to_dict() == jobset


@pytest.mark.parametrize("version", ["1.31", "1.34", "1.37"])
@pytest.mark.parametrize("name", NAMES)
def test_its_job_fits_the_schema_of_kubernetes(name, version):
    _, job, _ = read(name)
    metadata = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "caprl-host-0"}}
    kubernetes_validate.validate(metadata | job["template"], version, strict=True)


def action(jobset, job, code, disrupted=False):
    """Returns what Kubernetes and JobSet do about a pod's exit code, by the documented rules."""
    spec = job["template"]["spec"]
    assert spec["backoffLimit"] == 0  # otherwise the Job starts a single pod again
    reason = "BackoffLimitExceeded"
    for rule in spec["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes", {"values": []})["values"]
        conditions = [c["type"] for c in rule.get("onPodConditions", [])]
        if code in codes or (disrupted and "DisruptionTarget" in conditions):
            if rule["action"] == "Ignore":
                return "a new pod"
            assert rule["action"] == "FailJob"
            reason = "PodFailurePolicy"
            break
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        if reason in rule["onJobFailureReasons"]:
            return rule["action"]
    return "RestartJobSet"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("code", "disrupted", "expected"),
    [
        (1, False, "FailJobSet"),
        (2, False, "FailJobSet"),
        (processes.STOPPED, False, "a new pod"),
        (processes.STOPPED, True, "a new pod"),
        (processes.LOST, False, "RestartJobSet"),
        (ABORTED, False, "RestartJobSet"),
        (KILLED, False, "RestartJobSet"),
        (KILLED, True, "a new pod"),
    ],
)
def test_exit_codes_restart_where_that_helps(name, code, disrupted, expected):
    jobset, job, _ = read(name)
    assert action(jobset, job, code, disrupted) == expected
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0


@pytest.mark.parametrize("name", NAMES)
def test_all_pods_run_at_once_with_time_for_a_checkpoint(name):
    _, job, container = read(name)
    spec = job["template"]["spec"]
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"] > 1
    pod = spec["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] >= 180 and pod["restartPolicy"] == "Never"
    flags = dict(a.removeprefix("--").split("=", 1) for a in container["args"])
    assert (ROOT / flags["config"]).is_file()
    mounts = [m["mountPath"] for m in container["volumeMounts"]]
    assert any(flags["workdir"].startswith(f"{path}/") for path in mounts)


def test_gpu_pods_meet_at_the_first_pod():
    jobset, job, container = read("gke_gpu")
    pods = job["template"]["spec"]["completions"]
    network, name = jobset["spec"]["network"], jobset["metadata"]["name"]
    assert network == {"enableDNSHostnames": True, "publishNotReadyAddresses": True}
    for index in range(pods):
        flags = dict(
            a.removeprefix("--").replace("$(JOB_COMPLETION_INDEX)", str(index)).split("=", 1)
            for a in container["args"]
        )
        assert int(flags["process"]) == index and int(flags["processes"]) == pods
        processes._check(flags["coordinator"], int(flags["processes"]), int(flags["process"]))
        host = flags["coordinator"].split(":")[0]
        # JobSet's name of a pod: <jobset>-<replicated job>-<job>-<pod>.<subdomain>
        assert host == f"{name}-{job['name']}-0-0.{name}"


def test_tpu_pods_take_all_chips_of_the_slice():
    jobset, job, container = read("gke_tpu")
    spec = job["template"]["spec"]
    slice_ = spec["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = math.prod(int(n) for n in slice_.split("x"))
    assert spec["completions"] * container["resources"]["limits"]["google.com/tpu"] == chips
    # GKE tells TPU pods where the others are: flags would take another way.
    assert not re.search("--coordinator|--process", " ".join(container["args"]))
    assert "alpha.jobset.sigs.k8s.io/exclusive-topology" in jobset["metadata"]["annotations"]
