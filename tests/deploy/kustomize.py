"""What `kubectl kustomize` makes of a folder, as far as the folders here use it: resources, components, patches of both
kinds, configMapGenerator, images, namespace. Refuses what it does not know; test_overlays holds it to the real one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

Json = dict[str, Any]

_KEYS = {"apiVersion", "kind", "namespace", "resources", "components", "configMapGenerator", "images", "patches"}
# Lists of objects that are merged by a key in strategic merge patches; all others are replaced.
_MERGE_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "volumes": "name",
    "env": "name",
    "volumeMounts": "mountPath",
}
# libyaml where PyYAML has it.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
HASH = "-hash"  # in place of the hash of a generated ConfigMap's content


def render(folder: Path) -> list[Json]:
    """The manifests of a folder with a kustomization.yaml."""
    return _rendered(folder, [])


def _rendered(folder: Path, below: list[Json]) -> list[Json]:
    plan: Json = yaml.load((folder / "kustomization.yaml").read_text(encoding="utf-8"), _LOADER)
    if unknown := set(plan) - _KEYS:
        raise ValueError(f"{folder}: this renderer does not know {sorted(unknown)}")
    found = [*below, *(each for name in plan.get("resources", ()) for each in _resource(folder / name))]
    for name in plan.get("components", ()):
        found = _rendered(folder / name, found)
    found += [_config_map(folder, each) for each in plan.get("configMapGenerator", ())]
    for patch in plan.get("patches", ()):
        _patch(folder, patch, found)
    for image in plan.get("images", ()):
        _retag(found, image["name"], str(image["newTag"]))
    if (namespace := plan.get("namespace")) is not None:
        _move(found, namespace)
    _name_config_maps(found)
    return found


def _resource(path: Path) -> list[Json]:
    if path.is_dir():
        return _rendered(path, [])
    return [each for each in yaml.load_all(path.read_text(encoding="utf-8"), _LOADER) if each]


def _config_map(folder: Path, plan: Json) -> Json:
    options = plan.get("options", {})
    suffix = "" if options.get("disableNameSuffixHash") else HASH
    data = {name: (folder / name).read_text(encoding="utf-8") for name in plan["files"]}
    labels = {"labels": options["labels"]} if "labels" in options else {}
    metadata = {"name": plan["name"] + suffix, **labels}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


def _patch(folder: Path, patch: Json, found: list[Json]) -> None:
    text = patch["patch"] if "patch" in patch else (folder / patch["path"]).read_text(encoding="utf-8")
    change: Any = yaml.load(text, _LOADER)
    target = patch.get("target") or {"kind": change["kind"], "name": change["metadata"]["name"]}
    (place,) = [at for at, each in enumerate(found) if _is(each, target)]
    if isinstance(change, dict) and change.get("$patch") == "delete":
        del found[place]
    elif isinstance(change, list):
        for operation in change:
            _operate(found[place], operation)
    else:
        found[place] = _merged(found[place], change)


def _is(manifest: Json, target: Json) -> bool:
    return (manifest["kind"], manifest["metadata"]["name"]) == (target["kind"], target["name"])


def _operate(manifest: Json, operation: Json) -> None:
    *path, last = operation["path"].strip("/").split("/")
    at: Any = manifest
    for step in path:
        at = at[int(step)] if isinstance(at, list) else at[step]
    match operation["op"], at:
        case "add", list() if last == "-":
            at.append(operation["value"])
        case "add" | "replace", dict():
            at[last] = operation["value"]
        case "remove", dict():
            del at[last]
        case _:
            raise ValueError(f"this renderer does not know {operation}")


def _merged(old: Json, new: Json) -> Json:
    """A strategic merge patch: objects are merged, lists replaced unless they have a merge key."""
    merged = copy.deepcopy(old)
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merged(merged[key], value)
        elif key in _MERGE_KEYS and key in merged:
            merged[key] = _merged_list(merged[key], value, _MERGE_KEYS[key])
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def _merged_list(old: list[Json], new: list[Json], key: str) -> list[Json]:
    """New items come before the old ones."""
    changes = {each[key]: each for each in new}
    kept = [_merged(each, changes.pop(each[key])) if each[key] in changes else each for each in old]
    return [*copy.deepcopy(list(changes.values())), *kept]


def _pods(found: list[Json]) -> Iterator[Json]:
    for each in found:
        if each["kind"] == "Deployment":
            yield each["spec"]["template"]["spec"]


def _retag(found: list[Json], name: str, tag: str) -> None:
    for pod in _pods(found):
        for container in (*pod.get("initContainers", ()), *pod["containers"]):
            if container["image"].rpartition(":")[0] == name:
                container["image"] = f"{name}:{tag}"


def _move(found: list[Json], namespace: str) -> None:
    for each in found:
        each["metadata"]["namespace"] = namespace
        for subject in each.get("subjects", ()):
            subject["namespace"] = namespace


def _name_config_maps(found: list[Json]) -> None:
    """Volumes name generated ConfigMaps without their hash."""
    names = [each["metadata"]["name"] for each in found if each["kind"] == "ConfigMap"]
    hashed = {name.removesuffix(HASH): name for name in names if name.endswith(HASH)}
    for pod in _pods(found):
        for volume in pod.get("volumes", ()):
            if (told := volume.get("configMap")) is not None:
                told["name"] = hashed.get(told["name"], told["name"])
