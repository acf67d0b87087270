"""deploy/kubernetes against the server: its flags, variables, ports and endpoints, and what a read-only root needs. No cluster here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_models import FakeModels
from headrace import cli
from headrace.config import ServerConfig
from headrace.config_loading import load_server_config, option_keys
from headrace.http.server import HttpServer
from headrace.telemetry.metrics import make_registry

from scripts.dockerfile_rules import environment
from scripts.dockerfiles import parse

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "deploy" / "kubernetes"
FILES = sorted(path.name for path in FOLDER.glob("*.yaml"))
every = pytest.mark.parametrize("name", FILES)


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8")))


def pod(name: str) -> dict[str, Any]:
    first = documents(name)[0]["spec"]
    return first["template"]["spec"] if "template" in first else first


def server(name: str) -> dict[str, Any]:
    containers = [*pod(name).get("initContainers", []), *pod(name)["containers"]]
    return next(each for each in containers if each["image"].startswith("headrace:"))


def config(name: str) -> ServerConfig:
    """As the container starts: the image's environment, the manifest's, its arguments."""
    dockerfile = "Dockerfile.gpu" if server(name)["image"].endswith("-gpu") else "Dockerfile"
    variables = dict(environment(parse((ROOT / dockerfile).read_text(encoding="utf-8"))))
    variables |= {each["name"]: each["value"] for each in server(name).get("env", [])}
    options = cli._parser().parse_args(server(name).get("args", ["serve"]))
    flags = {key: value for key in option_keys(ServerConfig) if (value := getattr(options, key, None)) is not None}
    return load_server_config(flags, variables, None)


def probes(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        yield kind, server(name)[kind]


def test_there_is_a_manifest_of_each_kind() -> None:
    assert FILES == ["deployment.yaml", "gpu.yaml", "kserve-runtime.yaml", "sidecar.yaml"]


@every
def test_ports_are_those_that_the_server_listens_on(name: str) -> None:
    made = config(name)
    listened = {int(each.rpartition(":")[2]) for each in (*made.grpc, made.http) if not each.startswith("unix:")}
    assert {port["containerPort"] for port in server(name).get("ports", [])} <= listened
    names = {port["name"]: port["containerPort"] for port in server(name)["ports"]}
    for document in documents(name):
        if document["kind"] == "Service":
            assert all(names[port["targetPort"]] == port["port"] for port in document["spec"]["ports"])
    assert made.http.startswith("0.0.0.0:"), "the kubelet asks from outside the pod"


@every
def test_probes_ask_endpoints_that_the_server_has(name: str) -> None:
    made = config(name)
    paths = {
        route.resource.canonical for route in HttpServer(made.http, FakeModels(), make_registry(lambda: []))._make_app().router.routes()
    }
    ports = {port["name"]: port["containerPort"] for port in server(name)["ports"]}
    for kind, probe in probes(name):
        if "grpc" in probe:
            assert kind != "livenessProbe", "grpc.health.v1 says NOT_SERVING while it drains, and the kubelet would kill it"
            assert any(listener.endswith(f":{probe['grpc']['port']}") for listener in made.grpc)
            continue
        get = probe["httpGet"]
        assert get["path"] in paths
        assert get["path"] == ("/livez" if kind == "livenessProbe" else "/readyz")
        assert str(ports.get(get["port"], get["port"])) == made.http.rpartition(":")[2]


@every
def test_the_container_may_do_no_more_than_it_needs(name: str) -> None:
    own, whole = server(name)["securityContext"], pod(name).get("securityContext", {})
    assert own["readOnlyRootFilesystem"] is True
    assert own["allowPrivilegeEscalation"] is False
    assert own["capabilities"] == {"drop": ["ALL"]}
    assert (whole | own)["runAsNonRoot"] is True
    user = re.search(r"^USER (\d+):", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    assert user is not None
    assert (whole | own)["runAsUser"] == int(user[1])


@every
def test_a_read_only_root_has_the_two_folders_that_are_written_to(name: str) -> None:
    mounts = {mount["mountPath"]: mount["name"] for mount in server(name)["volumeMounts"]}
    writable = {volume["name"] for volume in pod(name)["volumes"] if "emptyDir" in volume}
    assert {mounts["/tmp"], mounts["/var/cache/headrace"]} <= writable
    assert {mount["name"] for mount in server(name)["volumeMounts"]} <= {volume["name"] for volume in pod(name)["volumes"]}


@every
def test_the_kubelet_waits_longer_than_the_server_drains(name: str) -> None:
    sleep = server(name).get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    if "terminationGracePeriodSeconds" in pod(name):  # KServe's is the InferenceService's
        assert pod(name)["terminationGracePeriodSeconds"] > config(name).shutdown_grace + sleep


def test_the_gpu_is_asked_for_by_the_device_plugins_resource() -> None:
    assert server("gpu.yaml")["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert all("nvidia.com/gpu" not in server(name)["resources"]["limits"] for name in FILES if name != "gpu.yaml")


def test_the_sidecar_is_reached_from_its_pod_alone() -> None:
    made = config("sidecar.yaml")
    assert all(listener.startswith(("127.0.0.1:", "unix:")) for listener in made.grpc)
    (socket,) = [listener.removeprefix("unix:") for listener in made.grpc if listener.startswith("unix:")]
    application = next(each for each in pod("sidecar.yaml")["containers"] if each["name"] == "application")
    shared = {mount["mountPath"] for mount in application["volumeMounts"]}
    assert str(Path(socket).parent) in shared
    assert "/dev/shm" in shared or not made.client_shared_memory
