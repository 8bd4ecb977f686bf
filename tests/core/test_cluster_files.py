"""The files of docs/cluster: what they say of rlattn is true, and their own tools find nothing wrong with them."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from rlattn.cli import _parser

ROOT = Path(__file__).parents[2]
FILES = ROOT / "docs" / "cluster"


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def rayjob():
    return yaml.safe_load((FILES / "rayjob.yaml").read_text())


def pods(rayjob):
    cluster = rayjob["spec"]["rayClusterSpec"]
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def test_the_slurm_script_passes_shellcheck():
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, FILES / "rlattn.sbatch"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_the_slurm_script_gives_the_run_arguments_that_it_takes():
    (line,) = re.findall(r"^rlattn (train .*) &$", (FILES / "rlattn.sbatch").read_text(), re.M)
    line = line.replace('"$@"', "my.yaml output_dir=/x").replace('"ray.address=$ADDRESS:$PORT"', "ray.address=a:1")
    args, rest = _parser().parse_known_args(line.split())
    assert args.resume
    assert {*args.overrides, *rest} >= {"ray.address=a:1", "output_dir=/x"}


def test_the_kubernetes_job_runs_a_command_that_exists(rayjob, project):
    args = _parser().parse_args(rayjob["spec"]["entrypoint"].removeprefix("rlattn ").split())
    assert (args.config, args.resume) == ("/config/config.yaml", True)
    (ray,) = [Requirement(line) for line in project["dependencies"] if Requirement(line).name == "ray"]
    assert ray.specifier.contains(rayjob["spec"]["rayClusterSpec"]["rayVersion"])
    assert rayjob["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}


def test_every_pod_of_it_has_its_volumes_and_enough_shared_memory(rayjob):
    for pod in pods(rayjob):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        (container,) = pod["containers"]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert mounts.keys() == {"/config", "/shared", "/dev/shm"}
        assert set(mounts.values()) == volumes.keys()
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        assert container["resources"]["requests"] == container["resources"]["limits"]


@pytest.mark.skipif("KUBERAY_CRD" not in os.environ, reason="KUBERAY_CRD names KubeRay's ray.io_rayjobs.yaml")
def test_the_kubernetes_job_is_valid_by_kuberays_schema(rayjob):
    jsonschema = pytest.importorskip("jsonschema")
    versions = yaml.safe_load(Path(os.environ["KUBERAY_CRD"]).read_text())["spec"]["versions"]
    (schema,) = [version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1"]
    _strict(schema)
    schema["properties"]["metadata"] = {"type": "object"}  # Kubernetes' own
    assert [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(rayjob)] == []
    rayjob["spec"]["rayClusterSpec"]["headGroupSpec"]["templat"] = {}
    assert len(list(jsonschema.Draft7Validator(schema).iter_errors(rayjob))) == 1


def _strict(schema):
    """Refuse unknown fields, as the API server does, and read Kubernetes' numbers-or-strings."""
    if isinstance(schema, list):
        for part in schema:
            _strict(part)
    if isinstance(schema, dict):
        if "properties" in schema and "additionalProperties" not in schema:
            schema["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
        if schema.get("x-kubernetes-int-or-string"):
            schema.pop("anyOf", None)
            schema["type"] = ["integer", "string"]
        for part in list(schema.values()):
            _strict(part)


def test_the_image_is_made_by_the_steps_that_are_tested_here(project):
    lines = (FILES / "Dockerfile").read_text()
    (extras,) = re.findall(r'pip install --no-cache-dir "\.\[(.*)\]"', lines)
    known = project["optional-dependencies"].keys()
    assert set(extras.replace("${EXTRA}", "gpu").split(",")) <= known
    assert "ARG EXTRA=gpu" in lines
    removed = re.search(r"pip uninstall -y (.*); fi", lines).group(1).split()
    makefile = (ROOT / "Makefile").read_text()
    assert removed == re.search(r"pip uninstall -q -y (.*)", makefile).group(1).split()
