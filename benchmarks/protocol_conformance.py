"""The front ends of Triton, KServe and MLServer against the Open Inference Protocol's own OpenAPI description.

    sh scripts/servers
    python benchmarks/protocol_conformance.py

schemathesis (pip install schemathesis) draws requests from the description, valid ones and ones that break it, and
compares every answer with it: status, content type, body. A third kind of infer request has the images that the model
takes, and everything else drawn. Requests are drawn with a seed, but depend on the versions of schemathesis and
hypothesis.

benchmarks/protocol/open_inference_rest.yaml is specification/protocol/open_inference_rest.yaml of
https://github.com/kserve/open-inference-protocol, commit d49cc23f89d7, Apache-2.0. Its paths have a dollar sign before
each parameter, which is taken off; paths without the version, which the protocol makes optional, are added; the model's
name is the one that is served.
"""

from __future__ import annotations

import argparse
import copy
import re
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import requests
import schemathesis
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from record import write_record
from schemathesis import GenerationMode  # pip install schemathesis
from schemathesis.core.failures import FailureGroup

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import malformed
from malformed_sending import SERVERS, started
from server_processes import Server

DESCRIPTION = Path(__file__).parent / "protocol" / "open_inference_rest.yaml"
MODEL = "made-up"
_VERSION = "/versions/{MODEL_VERSION}"
_REJECTED = "Schema-valid request rejected"  # tensors that are drawn are hardly ever this model's
KINDS = {"valid": GenerationMode.POSITIVE, "broken": GenerationMode.NEGATIVE, "good images": GenerationMode.POSITIVE}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=50, help="Of each kind, for each operation and server.")
    parser.add_argument("--seed", type=int, default=0)
    given_options = parser.parse_args()
    schema = schemathesis.openapi.from_dict(_description())
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        for name in SERVERS:
            with started(name, Path(place) / name) as server:
                found[name] = _conformance(schema, server, given_options.examples, given_options.seed)
            for operation, kinds in found[name].items():
                for kind, facts in kinds.items():
                    print(f"{name:<9} {operation:<48} {kind:<12} {facts['statuses']}", flush=True)
                    for failure, count in facts["failures"].items():
                        print(f"{'':<10}{count:>4} × {failure}", flush=True)
    write_record("protocol_conformance", {
        "servers": found, "examples": given_options.examples, "seed": given_options.seed,
        "schemathesis": version("schemathesis"), "hypothesis": version("hypothesis"),
    })  # fmt: skip


def _description() -> dict[str, Any]:
    text = DESCRIPTION.read_text(encoding="utf-8").replace("${", "{")
    found: dict[str, Any] = yaml.safe_load(text)
    for name, path in list(found["paths"].items()):
        if _VERSION in name:
            bare = copy.deepcopy(path)
            bare["parameters"] = [one for one in bare["parameters"] if one["name"] != "MODEL_VERSION"]
            found["paths"][name.replace(_VERSION, "")] = bare
    for path in found["paths"].values():
        for parameter in path.get("parameters", []):
            known = {"MODEL_NAME": MODEL, "MODEL_VERSION": "1"}.get(parameter["name"])
            if known is not None:
                parameter["schema"]["enum"] = [known]
    return found


def _conformance(schema: Any, server: Server, examples: int, number: int) -> dict[str, Any]:
    """By operation and kind of request: statuses, and how answers differ from the description."""
    found: dict[str, Any] = defaultdict(dict)
    for result in schema.get_all_operations():
        operation = result.ok()
        for kind, mode in KINDS.items():
            infers = operation.path.endswith("/infer")
            if (kind == "good images" and not infers) or (kind == "broken" and operation.method == "get"):
                continue
            statuses: Counter[str] = Counter()
            failures: Counter[str] = Counter()
            for case in _cases(operation, mode, examples, number):
                if kind == "good images":
                    case.body = (
                        {**case.body, "inputs": malformed.good()["inputs"]}
                        if isinstance(case.body, dict)
                        else case.body
                    )
                status, problems = _asked(case, server)
                statuses[status] += 1
                failures.update(problems)
            label = f"{operation.method.upper()} {operation.path}"
            found[label][kind] = {"statuses": dict(sorted(statuses.items())), "failures": dict(failures.most_common(8))}
    return found


def _cases(operation: Any, mode: GenerationMode, examples: int, number: int) -> Iterator[Any]:
    drawn: list[Any] = []

    @seed(number)
    @settings(
        max_examples=examples, phases=[Phase.generate], database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=operation.as_strategy(generation_mode=mode))
    def draw(case: Any) -> None:
        drawn.append(case)

    draw()
    yield from drawn[:examples]


def _asked(case: Any, server: Server) -> tuple[str, list[str]]:
    """Status of the answer, and in which ways it is not what the description says."""
    try:
        response = case.call(base_url=f"http://{server.http}", timeout=60)
    except requests.RequestException as error:
        return "none", [f"no answer: {type(error).__name__}"]
    try:
        case.validate_response(response)
    except FailureGroup as group:
        problems = [
            _short(f"{response.status_code}: {one.title}: {_about(one, response)}")
            for one in group.exceptions
            if one.title != _REJECTED
        ]
        return str(response.status_code), problems
    return str(response.status_code), []


def _about(failure: Any, response: Any) -> str:
    return response.text if response.status_code >= 500 else str(failure.message)


def _short(text: str) -> str:
    """One line, without the numbers that differ from request to request."""
    text = re.sub(r'(?<=File ")/\S*?/(?=lib/python|site-packages)', "", " ".join(text.split()))  # where it is installed
    return re.sub(r"\d{4,}", "…", text)[:160]


if __name__ == "__main__":
    main()
