from __future__ import annotations

import ssl
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from kubernetes.certificate import encoded, pair
from kubernetes.manifests import PODS
from kubernetes.real_cluster import Real
from kubernetes.stage import Stage, on_a_real_one
from picker.errors import ConfigError
from picker.sources.kubernetes.credentials import FileTokens, find_access, from_kubeconfig

CERTIFICATE, KEY = pair()
DATA, KEY_DATA = encoded(CERTIFICATE), encoded(KEY)


def kubeconfig(folder: Path, user: dict[str, Any] | None = None, cluster: dict[str, Any] | None = None) -> Path:
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "contexts": [
            {"name": "here", "context": {"cluster": "c", "user": "u", "namespace": "llm"}},
            {"name": "there", "context": {"cluster": "d", "user": "u"}},
        ],
        "clusters": [
            {"name": "c", "cluster": {"server": "https://c:6443/"} | (cluster or {})},
            {"name": "d", "cluster": {"server": "http://d:8080"}},
        ],
        "users": [{"name": "u", "user": user or {"token": "t"}}],
    }
    path = folder / "config"
    path.write_text(yaml.safe_dump(content))
    return path


def cluster(**more: Any) -> dict[str, Any]:
    return {"clusters": [{"name": "c", "cluster": {"server": "https://c"} | more}]}


def user(**more: Any) -> dict[str, Any]:
    return {"users": [{"name": "u", "user": more}]}


def service_account(folder: Path) -> Path:
    (folder / "token").write_text("sa-token\n")
    (folder / "namespace").write_text("llm\n")
    (folder / "ca.crt").write_bytes(CERTIFICATE)
    return folder


async def test_a_pod_uses_what_is_mounted_into_it(tmp_path: Path) -> None:
    environment = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}
    access = find_access(environment=environment, service_account=service_account(tmp_path))
    assert (access.url, access.namespace) == ("https://10.96.0.1:443", "llm")
    assert await access.tokens.token() == "sa-token"
    assert isinstance(access.tls, ssl.SSLContext)
    assert access.tls.verify_mode is ssl.CERT_REQUIRED
    assert "sa-token" not in repr(access)


def test_an_ipv6_cluster_has_its_address_in_brackets(tmp_path: Path) -> None:
    environment = {"KUBERNETES_SERVICE_HOST": "fd00::1"}
    assert (
        find_access(environment=environment, service_account=service_account(tmp_path)).url == "https://[fd00::1]:443"
    )


async def test_a_token_file_is_read_again_after_a_minute(tmp_path: Path) -> None:
    now = 0.0
    path = tmp_path / "token"
    path.write_text("one")
    tokens = FileTokens(path, clock=lambda: now)
    assert await tokens.token() == "one"
    path.write_text("two")
    now = 59.0
    assert await tokens.token() == "one"
    now = 60.0
    assert await tokens.token() == "two"


async def test_a_kubeconfig_says_where_and_who(tmp_path: Path) -> None:
    path = kubeconfig(tmp_path, cluster={"certificate-authority-data": DATA, "tls-server-name": "api"})
    access = from_kubeconfig(path)
    assert (access.url, access.namespace, access.server_name) == ("https://c:6443", "llm", "api")
    assert await access.tokens.token() == "t"
    assert from_kubeconfig(path, "there").url == "http://d:8080"


def test_the_file_is_found_where_kubectl_looks_for_it(tmp_path: Path) -> None:
    path = kubeconfig(tmp_path)
    nowhere = tmp_path / "none"
    environment = {"KUBECONFIG": f"{nowhere}:{path}", "HOME": str(tmp_path)}
    assert find_access(environment=environment, service_account=nowhere).url == "https://c:6443"
    (tmp_path / ".kube").mkdir()
    path.rename(tmp_path / ".kube" / "config")
    assert find_access(environment={"HOME": str(tmp_path)}, service_account=nowhere).url == "https://c:6443"
    with pytest.raises(ConfigError, match="give --kubeconfig FILE"):
        find_access(environment={"HOME": str(nowhere)}, service_account=nowhere)


def test_a_client_certificate_is_shown(tmp_path: Path) -> None:
    (tmp_path / "client.crt").write_bytes(CERTIFICATE)
    user = {"client-certificate": "client.crt", "client-key-data": KEY_DATA}
    access = from_kubeconfig(kubeconfig(tmp_path, user, {"insecure-skip-tls-verify": True}))
    assert isinstance(access.tls, ssl.SSLContext)
    assert access.tls.verify_mode is ssl.CERT_NONE


async def test_a_program_prints_tokens_until_they_expire(tmp_path: Path) -> None:
    expires = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    script = tmp_path / "plugin.py"
    script.write_text(
        "import json, os, pathlib\n"
        "count = pathlib.Path(os.environ['COUNT'])\n"
        "count.write_text(count.read_text() + 'x' if count.exists() else 'x')\n"
        "assert json.loads(os.environ['KUBERNETES_EXEC_INFO'])['kind'] == 'ExecCredential'\n"
        f"print(json.dumps({{'status': {{'token': count.read_text(), 'expirationTimestamp': {expires!r}}}}}))\n"
    )
    variables = [{"name": "COUNT", "value": str(tmp_path / "count")}]
    plugin = {"apiVersion": "client.authentication.k8s.io/v1", "command": sys.executable, "env": variables}
    access = from_kubeconfig(kubeconfig(tmp_path, {"exec": {**plugin, "args": [str(script)]}}))
    assert await access.tokens.token() == "x"
    assert await access.tokens.token() == "x"
    assert await access.tokens.token(renew=True) == "xx"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise SystemExit(3)", "ended with status 3"),
        ("print('no')", "no ExecCredential"),
        ("print('{\"status\":{}}')", "no token"),
    ],
)
async def test_a_program_that_fails_is_named(tmp_path: Path, code: str, words: str) -> None:
    access = from_kubeconfig(kubeconfig(tmp_path, {"exec": {"command": sys.executable, "args": ["-c", code]}}))
    with pytest.raises(OSError, match=words):
        await access.tokens.token()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"current-context": "x"}, "there is no context 'x'; known are here, there"),
        ({"clusters": []}, "names the cluster 'c', which is not there"),
        (cluster(server="c:6443"), "no http or https URL"),
        (cluster(**{"proxy-url": "http://p"}), "not supported"),
        (cluster(**{"certificate-authority-data": "%"}), "base64"),
        (cluster(**{"certificate-authority": "none"}), "authority"),
        (user(**{"auth-provider": {"name": "gcp"}}), "not supported: use exec"),
        (user(**{"client-certificate": "none", "client-key": "none"}), "cannot be read"),
        (user(**{"client-certificate-data": DATA, "client-key-data": DATA}), "cannot be used"),
        ({"clusters": 1}, "is no usable kubeconfig"),
    ],
)
def test_a_kubeconfig_that_cannot_be_used_says_why(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = kubeconfig(tmp_path)
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | change))
    with pytest.raises(ConfigError, match=words) as refused:
        from_kubeconfig(path)
    assert str(refused.value).startswith(str(path))
    assert "\n" not in str(refused.value)


def test_a_kubeconfig_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none: the kubeconfig cannot be read: No such file"):
        find_access(str(tmp_path / "none"))


@on_a_real_one
async def test_a_real_api_server_lets_a_pod_in_by_what_is_mounted_into_it(stage: Stage, tmp_path: Path) -> None:
    assert isinstance(stage, Real)
    pods = {"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]}
    token = await (await stage.account({"rules": [pods]})).tokens.token()
    assert token is not None
    (tmp_path / "token").write_text(token)
    (tmp_path / "namespace").write_text(stage.namespace)
    (tmp_path / "ca.crt").write_bytes(stage.authority)
    host, _, port = stage.url.removeprefix("https://").partition(":")
    environment = {"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": port or "443"}
    access = find_access(environment=environment, service_account=tmp_path)
    assert access.namespace == stage.namespace
    assert (await stage.ask("GET", stage.path(PODS), access=access)).status == 200
