"""The manifests against the schemas of Kubernetes, and against JobSet's published types."""

import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

SCRIPT = Path(__file__).resolve().parents[2] / "launch/gke/jobset.py"
TRAIN = ["--", "--config", "configs/gpt_tiny.py", "--workdir", "/gcs/runs/a"]
TPU = ["--tpu", "v5p", "--topology", "4x4x4"]
TEXT, NUMBER, TRUTH = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}


def record(required=(), **properties):
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


# kubernetes-sigs/jobset, api/jobset/v1alpha2/jobset_types.go: the fields that have been there since
# failure policies have rules. The Job inside is checked as batch/v1.
JOBSET = record(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=record(
        ["name"],
        name=TEXT,
        namespace=TEXT,
        annotations={"type": "object", "additionalProperties": TEXT},
        labels={"type": "object", "additionalProperties": TEXT},
    ),
    spec=record(
        ["replicatedJobs"],
        replicatedJobs={
            "type": "array",
            "minItems": 1,
            "items": record(
                ["name", "template"],
                name=TEXT,
                replicas=NUMBER,
                template=record(["spec"], metadata={"type": "object"}, spec={"type": "object"}),
            ),
        },
        network=record(
            [], enableDNSHostnames=TRUTH, subdomain=TEXT, publishNotReadyAddresses=TRUTH
        ),
        successPolicy=record(["operator"], operator={"enum": ["All", "Any"]}),
        failurePolicy=record(
            [],
            maxRestarts=NUMBER,
            rules={
                "type": "array",
                "items": record(
                    ["name", "action"],
                    name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
                    action={
                        "enum": [
                            "FailJobSet",
                            "RestartJobSet",
                            "RestartJobSetAndIgnoreMaxRestarts",
                        ]
                    },
                    onJobFailureReasons={
                        "type": "array",
                        "items": {
                            "enum": [
                                "BackoffLimitExceeded",
                                "DeadlineExceeded",
                                "FailedIndexes",
                                "MaxFailedIndexesExceeded",
                                "PodFailurePolicy",
                            ]
                        },
                    },
                    targetReplicatedJobs={"type": "array", "items": TEXT},
                ),
            },
        ),
        suspend=TRUTH,
        ttlSecondsAfterFinished=NUMBER,
    ),
)


def launch(*arguments, **environment):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def manifests(*arguments):
    done = launch("--name", "run1", "--image", "r/llm_jax:1", "--dry_run", *arguments, *TRAIN)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def job_of(jobset):
    (replicated,) = jobset["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


@pytest.mark.parametrize(
    "arguments",
    [
        TPU,
        [*TPU, "--num_slices", "3", "--spot", "--bucket", "b", "--service_account", "trainer"],
        ["--tpu", "v6e", "--topology", "16x16", "--env", "HF_TOKEN=x=y"],
        ["--gpu", "h100", "--num_hosts", "4", "--namespace", "research"],
        ["--gpu", "b200"],
    ],
    ids=["tpu", "slices", "v6e", "gpus", "one host"],
)
def test_manifests_are_valid(arguments):
    service, jobset = manifests(*arguments)
    kubernetes_validate.validate(service, "1.33", strict=True)
    jsonschema.validate(jobset, JOBSET)
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "j"}}
    kubernetes_validate.validate({**job, "spec": job_of(jobset)}, "1.33", strict=True)
    mounts = job_of(jobset)["template"]["spec"]["containers"][0]["volumeMounts"]
    volumes = job_of(jobset)["template"]["spec"]["volumes"]
    assert {mount["name"] for mount in mounts} == {volume["name"] for volume in volumes}


def test_the_schemas_catch_what_is_misspelled():
    _, jobset = manifests(*TPU)
    jobset["spec"]["failurePolicy"]["maxRestart"] = 3
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(jobset, JOBSET)
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "j"}}
    spec = {**job_of(jobset), "backofLimit": 0}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**job, "spec": spec}, "1.33", strict=True)


@pytest.mark.parametrize(
    ("tpu", "topology", "hosts", "chips", "accelerator"),
    [
        ("v5p", "4x4x4", 16, 4, "tpu-v5p-slice"),
        ("v5p", "2x2x1", 1, 4, "tpu-v5p-slice"),
        ("v4", "2x2x4", 4, 4, "tpu-v4-podslice"),
        ("v5e", "16x16", 64, 4, "tpu-v5-lite-podslice"),
        ("v6e", "2x4", 2, 4, "tpu-v6e-slice"),
        ("v6e", "1x1", 1, 1, "tpu-v6e-slice"),
        ("v7x", "2x2x2", 2, 4, "tpu7x"),
    ],
)
def test_a_slice_gets_a_pod_for_each_host(tpu, topology, hosts, chips, accelerator):
    _, jobset = manifests("--tpu", tpu, "--topology", topology, "--num_slices", "2")
    job = job_of(jobset)
    pod = job["template"]["spec"]
    assert jobset["spec"]["replicatedJobs"][0]["replicas"] == 2
    assert job["parallelism"] == job["completions"] == hosts
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": chips}
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == accelerator
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == topology
    exclusive = jobset["metadata"]["annotations"]["alpha.jobset.sigs.k8s.io/exclusive-topology"]
    assert exclusive == "cloud.google.com/gke-nodepool"


def test_pods_find_each_other():
    """On TPUs by GKE's variables, which need the service; on GPUs by the manifest's."""
    service, jobset = manifests("--gpu", "h100", "--num_hosts", "3")
    assert service["spec"]["clusterIP"] == "None"
    assert service["metadata"]["name"] == jobset["spec"]["network"]["subdomain"] == "run1"
    env = {v["name"]: v for v in job_of(jobset)["template"]["spec"]["containers"][0]["env"]}
    assert env["JAX_COORDINATOR_ADDRESS"]["value"] == "run1-worker-0-0.run1:8482"
    assert env["JAX_NUM_PROCESSES"]["value"] == "3"
    path = env["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert path == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    _, jobset = manifests(*TPU)
    env = [v["name"] for v in job_of(jobset)["template"]["spec"]["containers"][0]["env"]]
    assert not [name for name in env if name.startswith("JAX_")]


def test_the_run_is_what_follows_the_dashes():
    _, jobset = manifests(*TPU)
    container = job_of(jobset)["template"]["spec"]["containers"][0]
    assert container["command"] + container["args"] == ["python", "-m", "llm_jax.train", *TRAIN[1:]]


def test_a_lost_pod_starts_all_again_and_disruptions_do_not_count():
    _, jobset = manifests(*TPU, "--max_restarts", "7", "--grace_seconds", "90")
    job = job_of(jobset)
    assert job["backoffLimit"] == 0
    assert job["template"]["spec"]["terminationGracePeriodSeconds"] == 90
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 7
    assert policy["rules"][0]["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert [condition["type"] for condition in rule["onPodConditions"]] == ["DisruptionTarget"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tpu", "v5p", "--topology", "4x4"], "--topology 4x4: a v5p slice has 3 axes, such as"),
        (["--tpu", "v6e", "--topology", "3x3"], "9 chips are no whole hosts of 4"),
        (["--tpu", "v5p"], "--topology None: a v5p slice has 3 axes"),
        (["--tpu", "v9"], "no 'v9' here; choices: v4, v5e, v5p, v6e, v7x"),
        (["--gpu", "k80"], "no 'k80' here; choices: a100, h100"),
        ([*TPU, "--gpu", "h100"], "give --tpu KIND --topology SHAPE, or --gpu KIND --num_hosts N"),
        ([*TPU, "--num_slices", "0"], "--num_slices 0 must be at least 1"),
        ([*TPU, "--name", "Run_1"], "--name Run_1: expected at most 40 of a-z, 0-9 and -"),
        ([*TPU, "--env", "A"], "--env A: expected NAME=VALUE"),
    ],
)
def test_errors_are_one_line(arguments, message):
    done = launch("--name", "run1", "--image", "i", "--dry_run", *arguments, *TRAIN)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_without_kubectl_it_says_so(tmp_path):
    done = launch("--name", "run1", "--image", "i", *TPU, *TRAIN, PATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("error: kubectl not found")


@pytest.mark.parametrize(("flag", "verb"), [(None, "apply"), ("--delete", "delete")])
def test_manifests_go_to_kubectl(tmp_path, flag, verb):
    fake = tmp_path / "kubectl"
    fake.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\n/bin/cat > {tmp_path}/input\n')
    fake.chmod(0o755)
    arguments = ["--name", "run1", "--image", "r/llm_jax:1", *TPU, *([flag] if flag else [])]
    assert launch(*arguments, *TRAIN, PATH=str(tmp_path)).returncode == 0
    assert (tmp_path / "arguments").read_text().split()[0] == verb
    sent = list(yaml.safe_load_all((tmp_path / "input").read_text()))
    assert sent == manifests(*TPU)


def cronjob(*arguments):
    script = SCRIPT.with_name("eval_cronjob.py")
    base = ["--name", "evals", "--image", "registry/llm_jax:1", "--dry_run"]
    return subprocess.run(
        [sys.executable, str(script), *base, *arguments], capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "devices", [["--gpu", "h100", "--num_gpus", "2"], ["--tpu", "v5e", "--topology", "2x2"]]
)
def test_a_cronjob_scores_checkpoints(devices):
    flags = ["--bucket", "b", "--spot", "--", "--workdir", "/gcs/runs/a", "--batch_size", "4"]
    done = cronjob(*devices, *flags)
    assert done.returncode == 0, done.stderr
    (found,) = yaml.safe_load_all(done.stdout)
    kubernetes_validate.validate(found, "1.33", strict=True)
    assert found["spec"]["schedule"] == "*/10 * * * *"
    pod = found["spec"]["jobTemplate"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    assert container["command"] == ["python", "-m", "llm_jax.evaluate"]
    assert container["args"] == ["--once", "--workdir", "/gcs/runs/a", "--batch_size", "4"]
    assert 2 in container["resources"]["limits"].values() or "--tpu" in devices
    assert pod["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h100", "--schedule", "hourly", "--", "--workdir", "a"], "expected five fields"),
        (["--gpu", "h100", "--num_gpus", "9", "--", "--workdir", "a"], "must lie in 1..8"),
        (["--tpu", "v5p", "--topology", "4x4x4", "--", "--workdir", "a"], "has several hosts"),
        (["--gpu", "h100"], "no --workdir after"),
    ],
)
def test_cronjobs_that_cannot_be(arguments, message):
    done = cronjob(*arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
