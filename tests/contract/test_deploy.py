"""What runs the service elsewhere fits the service: image, compose file, Kubernetes manifest, alerts, dashboard."""

import json
import re
import shutil
import subprocess
from functools import cache
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from tests.patience import PROCESS_S
from tests.service.registry import registered_metrics
from tests.service.test_docs import rows
from text2weight_service.app import create_app
from text2weight_service.settings import Settings, unknown_variables, variable_name

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
UID = 10001
DOCKERFILE = (ROOT / "Dockerfile").read_text()
DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/text2weight.json").read_text())
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
WORKERS = [name for name, service in COMPOSE["services"].items() if service["image"].startswith("text2weight")]

each_service = pytest.mark.parametrize("name", list(COMPOSE["services"]))
each_worker = pytest.mark.parametrize("name", WORKERS)


@cache
def routes() -> set[str]:
    return set(create_app(Settings()).openapi()["paths"])


def settings_of(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Read an environment as the worker does; a name or a value that it does not know is an error."""
    ours = {name: value for name, value in environment.items() if name.startswith("T2W_")}
    assert unknown_variables(ours) == []
    for field in Settings.model_fields:
        monkeypatch.delenv(variable_name(field), raising=False)
    for name, value in ours.items():
        monkeypatch.setenv(name, value)
    return Settings()


def metrics_in(expression: str) -> set[str]:
    """Names of metrics in a PromQL expression, without the suffixes of a histogram's series."""
    names = re.findall(r"\b(?:t2w|process)_[a-z0-9_]+", re.sub(r'"[^"]*"', "", expression))
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}


def known_metrics() -> set[str]:
    process = ("resident_memory_bytes", "cpu_seconds_total", "open_fds", "max_fds")
    return set(registered_metrics()) | {f"process_{name}" for name in process}


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def run_where_installed(*command: str) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PROCESS_S)
    assert done.returncode == 0, done.stdout + done.stderr


# The image.


def test_image_runs_as_a_stated_user_and_drains() -> None:
    lines = DOCKERFILE.splitlines()
    assert f"USER {UID}:{UID}" in lines
    assert "STOPSIGNAL SIGTERM" in lines
    assert 'ENTRYPOINT ["t2w", "serve"]' in lines


def test_image_checks_a_route_that_exists() -> None:
    paths = set(re.findall(r"'T2W_HTTP_PORT'\]\}(/[a-z/]+)", DOCKERFILE))
    assert paths == {"/health/ready"}
    assert paths <= routes()


def test_image_copies_what_its_context_holds() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        source
        for line in DOCKERFILE.splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for source in line.split()[1:-1]
    }
    assert copied == allowed
    assert "training" not in copied
    assert [name for name in copied if not (ROOT / name).exists()] == []


def test_image_leaves_out_only_what_torch_asks_for() -> None:
    lines = (DEPLOY / "image/cpu-overrides.txt").read_text().splitlines()
    left_out = {Requirement(line).name for line in lines if not line.startswith("#")}
    asked_for = {Requirement(line).name for line in requires("torch") or []}
    if "triton" not in asked_for:
        pytest.skip("this is a build of torch for CPUs")
    assert left_out == {name for name in asked_for if name.startswith(("nvidia", "cuda", "triton"))}


# Compose.


@pytest.mark.parametrize("profiles", [[], ["--profile", "gpu", "--profile", "observability"]], ids=["plain", "all"])
def test_compose_accepts_the_file(profiles: list[str]) -> None:
    run_where_installed("docker-compose", *profiles, "config", "--quiet")


@each_service
def test_compose_services_are_hardened_and_bounded(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert {"cpus", "mem_limit", "pids_limit"} <= set(service)
    assert [port for port in service.get("ports", []) if not port.startswith("127.0.0.1:")] == []
    if name not in WORKERS:  # their image has a check of its own
        assert service["healthcheck"]["test"][0] == "CMD"
        assert re.search(r":v?\d+\.\d+", service["image"]), "an image without a version changes by itself"


@each_worker
def test_compose_settings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    service = COMPOSE["services"][name]
    environment = {key: re.sub(r"\$\{\w+:-(.*)\}", r"\1", value) for key, value in service["environment"].items()}
    settings = settings_of(environment, monkeypatch)
    assert settings.device == ("cuda" if name == "worker-gpu" else "cpu")
    assert service["stop_grace_period"] == "40s"
    assert settings.drain_timeout_s < 40
    assert service["depends_on"] == {"redis": {"condition": "service_healthy"}}
    assert environment["T2W_API_KEYS_FILE"] == f"/run/secrets/{service['secrets'][0]}"
    assert set(service["secrets"]) <= set(COMPOSE["secrets"])


def test_keys_are_never_committed() -> None:
    """Git ignores the file of keys, and the image's context does not reach it."""
    path = COMPOSE["secrets"]["api-keys"]["file"]
    assert path.removeprefix("./") in (ROOT / ".gitignore").read_text().splitlines()


def test_redis_is_a_bounded_cache() -> None:
    command = COMPOSE["services"]["redis"]["command"]
    assert command[command.index("--maxmemory-policy") + 1] == "allkeys-lru"
    assert "--maxmemory" in command
    assert COMPOSE["networks"]["data"]["internal"] is True
    assert COMPOSE["services"]["redis"]["networks"] == ["data"]


# Prometheus and Grafana.


def test_prometheus_accepts_its_configuration() -> None:
    run_where_installed("promtool", "check", "config", "deploy/prometheus/prometheus.yml")


def test_alerts_fire_when_they_should() -> None:
    run_where_installed("promtool", "test", "rules", "deploy/prometheus/alerts_test.yml")


def test_every_alert_has_a_case_in_which_it_fires() -> None:
    cases = yaml.safe_load((DEPLOY / "prometheus/alerts_test.yml").read_text())["tests"]
    checks = [check for case in cases for check in case["alert_rule_test"]]
    fired = {check["alertname"] for check in checks if check.get("exp_alerts")}
    assert fired == {rule["alert"] for rule in alerts()}


def test_prometheus_scrapes_the_workers() -> None:
    (job,) = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())["scrape_configs"]
    (discovery,) = job["dns_sd_configs"]
    assert discovery["names"] == WORKERS
    assert job["job_name"] == "text2weight"


def test_alerts_ask_for_metrics_that_exist() -> None:
    asked = {name: metrics_in(rule["expr"]) for rule in alerts() for name in [rule["alert"]]}
    assert {name: unknown for name, metrics in asked.items() if (unknown := metrics - known_metrics())} == {}


def test_every_alert_is_in_the_runbook() -> None:
    assert [row[0] for row in rows("operations.md", "Alerts")] == [rule["alert"] for rule in alerts()]


def test_dashboard_asks_for_metrics_that_exist() -> None:
    expressions = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    expressions += [variable["query"]["query"] for variable in DASHBOARD["templating"]["list"]]
    asked = set().union(*map(metrics_in, expressions))
    assert asked - known_metrics() == set()


def test_dashboard_shows_the_share_of_heads_that_joined(tmp_path: Path) -> None:
    """16 samples in one request count as 16 heads: shares of requests would be over 1."""
    (expression,) = (
        target["expr"].replace("$instance", ".*").replace("$__rate_interval", "5m")
        for panel in DASHBOARD["panels"]
        for target in panel["targets"]
        if target["legendFormat"] == "joined an equal request"
    )
    per_minute = {
        't2w_joined_total{instance="a"}': 32,
        't2w_heads_generated_total{instance="a"}': 80,
        't2w_heads_generated_total{instance="b"}': 16,
        't2w_http_requests_total{instance="a", route="/generate", status="200"}': 8,
    }
    case = {
        "interval": "1m",
        "input_series": [{"series": name, "values": f"0+{rate}x10"} for name, rate in per_minute.items()],
        "promql_expr_test": [{"expr": expression, "eval_time": "10m", "exp_samples": [{"value": 0.25}]}],
    }
    (tmp_path / "joined.yml").write_text(yaml.safe_dump({"tests": [case]}))
    run_where_installed("promtool", "test", "rules", str(tmp_path / "joined.yml"))


def test_dashboard_uses_the_provisioned_source() -> None:
    (source,) = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    assert {panel["datasource"]["uid"] for panel in DASHBOARD["panels"]} == {source["uid"]}
    assert source["url"] == "http://prometheus:9090"


def test_dashboard_panels_do_not_overlap() -> None:
    cells = [
        (x, y)
        for panel in DASHBOARD["panels"]
        for place in [panel["gridPos"]]
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


# Kubernetes.


@cache
def manifest() -> dict[tuple[str, str], dict[str, Any]]:
    documents = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    return {(document["kind"], document["metadata"]["name"]): document for document in documents}


def pod(name: str = "text2weight") -> dict[str, Any]:
    spec: dict[str, Any] = manifest()["Deployment", name]["spec"]["template"]["spec"]
    return spec


def worker_container() -> dict[str, Any]:
    (container,) = pod()["containers"]
    found: dict[str, Any] = container
    return found


def test_manifest_holds_every_part() -> None:
    kinds = {kind for kind, name in manifest() if name == "text2weight"}
    assert kinds == {"Deployment", "Service", "HorizontalPodAutoscaler", "PodDisruptionBudget", "NetworkPolicy"}


@pytest.mark.parametrize("name", ["text2weight", "text2weight-redis"])
def test_pods_may_do_nothing_but_their_work(name: str) -> None:
    spec = pod(name)
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in spec["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert "memory" in container["resources"]["limits"]


def test_worker_pod_runs_as_the_image_says() -> None:
    assert pod()["securityContext"]["runAsUser"] == UID


def test_worker_pod_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    container = worker_container()
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    settings = settings_of(environment, monkeypatch)
    (port,) = container["ports"]
    assert port["containerPort"] == settings.http_port
    assert settings.torch_threads == int(container["resources"]["limits"]["cpu"])
    pause_s = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod()["terminationGracePeriodSeconds"] > pause_s + settings.drain_timeout_s
    redis = manifest()["Service", "text2weight-redis"]
    assert environment["T2W_REDIS_URL"] == f"redis://{redis['metadata']['name']}:{redis['spec']['ports'][0]['port']}/0"
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert environment["T2W_API_KEYS_FILE"].startswith(f"{mounts['api-keys']}/")
    assert {volume["name"] for volume in pod()["volumes"]} == set(mounts)


def test_probes_ask_routes_that_exist() -> None:
    container = worker_container()
    asked = {name: container[name]["httpGet"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert asked["livenessProbe"]["path"] == "/health/live"
    assert asked["readinessProbe"]["path"] == asked["startupProbe"]["path"] == "/health/ready"
    assert {probe["path"] for probe in asked.values()} <= routes()
    assert {probe["port"] for probe in asked.values()} == {container["ports"][0]["name"]}
    annotations = manifest()["Deployment", "text2weight"]["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/path"] in routes()
    assert int(annotations["prometheus.io/port"]) == container["ports"][0]["containerPort"]


def test_public_metrics_stay_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Metrics that are answered without a key name the keys: nothing here takes them out of the machine or cluster."""
    environment = {entry["name"]: entry["value"] for entry in worker_container()["env"]}
    assert settings_of(environment, monkeypatch).public_metrics
    assert manifest()["Service", "text2weight"]["spec"].get("type", "ClusterIP") == "ClusterIP"
    assert not {kind for kind, _ in manifest()} & {"Ingress", "Gateway", "HTTPRoute"}
    for name in WORKERS:
        assert all(port.startswith("127.0.0.1:") for port in COMPOSE["services"][name]["ports"])


@pytest.mark.parametrize("name", ["text2weight", "text2weight-redis"])
def test_everything_selects_the_pods(name: str) -> None:
    labels = manifest()["Deployment", name]["spec"]["template"]["metadata"]["labels"]
    selectors = [
        manifest()["Deployment", name]["spec"]["selector"]["matchLabels"],
        manifest()["Service", name]["spec"]["selector"],
        manifest()["NetworkPolicy", name]["spec"]["podSelector"]["matchLabels"],
    ]
    if name == "text2weight":
        selectors.append(manifest()["PodDisruptionBudget", name]["spec"]["selector"]["matchLabels"])
    assert [selector for selector in selectors if selector != labels] == []


def test_autoscaler_scales_the_worker() -> None:
    autoscaler = manifest()["HorizontalPodAutoscaler", "text2weight"]["spec"]
    assert ("Deployment", autoscaler["scaleTargetRef"]["name"]) in manifest()
    assert autoscaler["minReplicas"] > manifest()["PodDisruptionBudget", "text2weight"]["spec"]["minAvailable"]
