# SPDX-License-Identifier: GPL-3.0-only
"""The container files, without a container engine: the manifest against Kubernetes' own schemas, the Dockerfile by its
linter, and both against what serve.py really has."""
import json
import pathlib
import re
import shutil
import subprocess
import sys
import urllib.error

import pytest
from conftest import ROOT
from servers import no_key_fixture, serving, tiny_model  # noqa: F401 (one is a fixture)

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
    """The manifest is one that Kubernetes takes."""
    check = [tool("kubernetes-validate"), "--strict"]
    assert subprocess.run([*check, ROOT / "deploy/kubernetes.yaml"]).returncode == 0
    bad = tmp_path / "bad.yaml"
    good = (ROOT / "deploy/kubernetes.yaml").read_text(encoding="utf-8")
    bad.write_text(good.replace("replicas: 2", "replicas: two"), encoding="utf-8")
    assert subprocess.run([*check, bad]).returncode != 0  # the check can fail


def test_the_dockerfile_has_no_lint():
    """The linter has nothing to say about the Dockerfile."""
    done = subprocess.run([tool("hadolint"), ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_manifest_fits_the_server():
    """Ports, paths, settings and the name of the key are those of serve.py."""
    pod = DEPLOYMENT["spec"]["template"]["spec"]
    assert DEPLOYMENT["spec"]["replicas"] == 2
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
    """Its command has settings of serve.py, for the run where the manifest puts it, and no run goes into the image."""
    command = DOCKERFILE.rpartition("ENTRYPOINT ")[2].strip().strip("[]").replace('"', "").split(", ")
    assert command[:2] == ["python", "serve.py"]
    settings, _, runs = load(serve.ServeConfig, command[2:])
    assert settings.host == "0.0.0.0" and not settings.no_auth and runs == [CONTAINER["volumeMounts"][0]["mountPath"]]
    assert f"EXPOSE {settings.port}\n" in DOCKERFILE
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert {"/out", "/data", ".git"} <= set(ignored)


def test_the_health_check_of_the_container(no_key, monkeypatch):
    """Its command ends without an error where the server is well, and with one where it is not."""
    monkeypatch.setenv("no_proxy", "*")
    command = json.loads(re.search(r"^HEALTHCHECK .*CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)[1])
    assert command[:2] == ["python", "-c"] and f":{serve.ServeConfig().port}/health" in command[2]
    with serving(tiny_model()) as client:
        code = command[2].replace(f":{serve.ServeConfig().port}/", f":{client.port}/")
        exec(code)
        client.server.draining = True
        with pytest.raises(urllib.error.HTTPError, match="503"):
            exec(code)
