# SPDX-License-Identifier: GPL-3.0-only
"""The container files, without a container engine: the manifest against Kubernetes' own schemas, the Dockerfile by its
linter, and both against what serve.py really has."""
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

import serve
from runtime.settings import load

yaml = pytest.importorskip("yaml", reason="pip install -r requirements-dev.txt")
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
DEPLOYMENT, SERVICE = yaml.safe_load_all((ROOT / "deploy/kubernetes.yaml").read_text(encoding="utf-8"))
CONTAINER, = DEPLOYMENT["spec"]["template"]["spec"]["containers"]


def tool(name):
    path = shutil.which(name, path=str(pathlib.Path(sys.executable).parent)) or shutil.which(name)
    if not path:
        pytest.skip(f"{name} is not installed: pip install -r requirements-dev.txt")
    return path


def test_the_manifest_is_valid(tmp_path):
    check = [tool("kubernetes-validate"), "--strict"]
    assert subprocess.run([*check, ROOT / "deploy/kubernetes.yaml"]).returncode == 0
    bad = tmp_path / "bad.yaml"
    good = (ROOT / "deploy/kubernetes.yaml").read_text(encoding="utf-8")
    bad.write_text(good.replace("replicas: 2", "replicas: two"), encoding="utf-8")
    assert subprocess.run([*check, bad]).returncode != 0  # the check can fail


def test_the_dockerfile_has_no_lint():
    done = subprocess.run([tool("hadolint"), ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_manifest_fits_the_server():
    pod = DEPLOYMENT["spec"]["template"]["spec"]
    assert DEPLOYMENT["spec"]["replicas"] == 2
    assert CONTAINER["resources"]["requests"]["memory"] == "2Gi" and CONTAINER["resources"]["limits"]["memory"] == "4Gi"
    port, = CONTAINER["ports"]
    assert port["containerPort"] == serve.ServeConfig().port
    assert SERVICE["spec"]["ports"][0]["port"] == 80 and SERVICE["spec"]["ports"][0]["targetPort"] == port["name"]
    assert SERVICE["spec"]["selector"].items() <= DEPLOYMENT["spec"]["template"]["metadata"]["labels"].items()
    key, = CONTAINER["env"]
    assert key["name"] == "OPENLLM_API_KEY" and key["valueFrom"]["secretKeyRef"]["name"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert CONTAINER[probe]["httpGet"] == {"path": "/health", "port": port["name"]}
    settings, _, _ = load(serve.ServeConfig, CONTAINER["args"])
    assert settings.drain < pod["terminationGracePeriodSeconds"]


def test_the_dockerfile_starts_the_server():
    command = DOCKERFILE.rpartition("ENTRYPOINT ")[2].strip().strip("[]").replace('"', "").split(", ")
    assert command[:2] == ["python", "serve.py"]
    settings, _, runs = load(serve.ServeConfig, command[2:])
    assert settings.host == "0.0.0.0" and not settings.no_auth and runs == [CONTAINER["volumeMounts"][0]["mountPath"]]
    assert f"EXPOSE {settings.port}\n" in DOCKERFILE
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert {"/out", "/data", ".git"} <= set(ignored)
    probe = shlex.split(DOCKERFILE.partition("HEALTHCHECK ")[2].partition("CMD ")[2].split("\n")[0].strip("[]"))
    assert probe[0] == "python," and "/health" in probe[2]
