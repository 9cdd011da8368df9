"""The launchers' dry runs, the manifest, and the pins of the extras."""

import os
import pathlib
import re
import shlex
import subprocess
import tomllib

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parent.parent
COMMAND = ["train", "--config", "configs/nano.py:devices=1", "--workdir", "gs://bucket/a run"]


def launch(script, *args, **env):
    """(exit code, the words of every command that would be run, stderr)."""
    done = subprocess.run(
        ["bash", ROOT / "launch" / script, *args],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": os.environ["PATH"], "DRY_RUN": "1", **env},
    )
    split = r"""while read -r line; do eval "words=($line)"; printf '%s\0' "${words[@]}"; printf '\1\0'; done"""
    words = subprocess.run(
        ["bash", "-c", split], input=done.stdout, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    lines = [[]]
    for word in words[:-1]:
        lines.append([]) if word == "\1" else lines[-1].append(word)
    return done.returncode, lines[:-1], done.stderr


def test_a_tpu_pod_is_asked_for_filled_run_and_emptied(tmp_path):
    where = ["--zone", "us-east5-b", "--project", "p"]
    code, lines, errors = launch(
        "tpu_pod.sh",
        *COMMAND,
        TPU="pod",
        ZONE="us-east5-b",
        PROJECT="p",
        SPOT="1",
        TYPE="v5litepod-256",
        FETCH=str(tmp_path / "run"),
    )
    assert code == 0, errors
    assert [line[:5] for line in lines[:4]] == [
        ["gcloud", "compute", "tpus", *rest]
        for rest in (
            ("queued-resources", "create"),
            ("queued-resources", "describe"),
            ("tpu-vm", "scp"),
            ("tpu-vm", "ssh"),
        )
    ]
    assert lines[0][5:] == [
        "pod",
        "--node-id",
        "pod",
        *where,
        "--accelerator-type",
        "v5litepod-256",
        "--runtime-version",
        "v2-alpha-tpuv5-lite",
        "--spot",
    ]
    assert lines[2][6:] == ["pod:argenseg.tgz", *where, "--worker=all"]
    remote = lines[3][lines[3].index("--command") + 1]
    assert shlex.split(remote.splitlines()[-1])[2:] == ["argenseg_jax", *COMMAND, "--distributed"]
    assert "pip install -q '.[tpu]'" in remote
    assert (
        lines[4]
        == [
            "gcloud",
            "storage",
            "rsync",
            "--recursive",
            "--exclude=checkpoints/.*",
            "gs://bucket/a run",
            str(tmp_path / "run"),
        ]
        and len(lines) == 5
    )


def test_a_tpu_pod_that_is_there_already():
    code, lines, _ = launch("tpu_pod.sh", *COMMAND, TPU="pod", ZONE="z")
    assert code == 0 and [line[4] for line in lines] == ["scp", "ssh"]
    code, _, errors = launch("tpu_pod.sh", *COMMAND)
    assert code and "name of the TPU slice" in errors
    code, _, errors = launch("tpu_pod.sh", "evaluate", TPU="pod", ZONE="z", FETCH="here")
    assert code == 2 and "FETCH needs a command with --workdir gs://" in errors


def test_slurm_starts_one_process_a_node():
    code, lines, errors = launch("slurm.sh", *COMMAND, SLURM_GPUS_ON_NODE="8")
    assert code == 0, errors
    assert lines == [["srun", ".venv/bin/python", "-m", "argenseg_jax", *COMMAND, "--distributed"]]
    code, _, errors = launch("slurm.sh", *COMMAND, DRY_RUN="")
    assert code and "submit this file with sbatch" in errors


def test_the_manifest_is_a_job_set_of_whole_slices():
    one = yaml.safe_load((ROOT / "launch" / "jobset.yaml").read_text())
    assert (one["kind"], one["apiVersion"]) == ("JobSet", "jobset.x-k8s.io/v1alpha2")
    job = one["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    chips = int(pod["containers"][0]["resources"]["limits"]["google.com/tpu"])
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert job["completions"] == job["parallelism"] == rows * columns / chips
    assert pod["containers"][0]["command"][-1] == "--distributed"


def locked(*names):
    """{package: version} of lock files, each requirement with hashes."""
    found = {}
    for name in names:
        text = (ROOT / name).read_text()
        for requirement in re.findall(r"^\S(?:.*\\\n)*.*", re.sub("^#.*", "", text, flags=re.M), re.M):
            package, version = re.match(r"([\w.-]+)==([\w.+]+)", requirement).groups()
            assert "--hash=sha256:" in requirement, f"{name}: {package}"
            found.setdefault(canonicalize_name(package), set()).add(version)
    return found


def test_the_locks_are_within_the_ranges_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert {"tpu", "cuda", "torch", "test", "lint", "compile", "serve"} <= set(extras)
    pins = locked("requirements-test.txt", "launch/requirements-torch.txt")
    run = locked("requirements.txt")
    assert all(pins[name] == versions for name, versions in run.items())
    for listed in (project["dependencies"], extras["test"], extras["lint"], extras["torch"], extras["beam"]):
        for requirement in map(Requirement, listed):
            if requirement.name != project["name"]:
                versions = pins[canonicalize_name(requirement.name)]
                assert all(v.split("+")[0] in requirement.specifier for v in versions), requirement
    assert {canonicalize_name(Requirement(r).name) for r in project["dependencies"]} <= set(run)


def test_the_wheel_has_every_package():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "argenseg_jax").rglob("__init__.py")}
    assert set(settings["packages"]) - set(settings["package-dir"]) | {"argenseg_jax"} == found
    assert all((ROOT / folder).is_dir() for folder in settings["package-dir"].values())
