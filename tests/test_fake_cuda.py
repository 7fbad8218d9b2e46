"""What can be known of GPUs without one: the real torch and onnxruntime on a driver that claims to have a card."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fake_cuda
import pytest
from fake_cuda import Card, answer, run
from fake_cuda.partition import chains, operators
from server_processes import free_ports

from klas_zoo.families.specs import builtin_families

ROOT = Path(__file__).parent.parent
# of shapes: what onnxruntime computes on the CPU on purpose, and what needs no copy of features
SHAPE_ARITHMETIC = {"Concat", "Squeeze", "Mul", "Reshape"}
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


FAMILIES = sorted(builtin_families())


def about_families(driver: Path) -> dict[str, Any]:
    """What partition.py says of every family, in two processes at once."""
    script = str(ROOT / "tests" / "fake_cuda" / "partition.py")
    # the slowest to translate are swin, swinv2 and tiny-vit
    with ThreadPoolExecutor(2) as pool:
        shares = pool.map(lambda part: run(driver, script, *FAMILIES[part::2]), range(2))
    found: dict[str, Any] = {}
    for done in shares:
        assert done.returncode == 0, done.stderr[-2000:]
        found |= json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="session")
def partitions(driver: Path) -> dict[str, Any]:
    return about_families(driver)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_shortened_network_has_every_operator_of_the_whole_one(family: str) -> None:
    short, whole = chains(family)
    assert operators(whole, whole.input_shape) <= operators(short, whole.input_shape)
    assert short.depth <= whole.depth


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_lies_on_the_gpu_in_every_precision_or_is_refused_in_a_sentence(
    partitions: dict[str, Any], family: str, precision: str
) -> None:
    found = partitions[family][precision]
    if "refused" in found:
        # no kernels of onnxruntime 1.31 for these in bfloat16
        assert precision == "bf16"
        missing = re.fullmatch(r"onnxruntime's \w+ has no kernel for (\w+) in the precision of .*: use fp16 or fp32\.",
                               found["refused"])  # fmt: skip
        assert missing is not None and missing[1] in ("MaxPool", "Pad", "CumSum")
        return
    operators = {name for nodes in found["nodes"].values() for name in nodes}
    assert not any(name.startswith("Memcpy") for name in operators)
    assert found["nodes"].get(CPU, {}).keys() <= SHAPE_ARITHMETIC
    assert sum(found["nodes"][CUDA].values()) >= 20
    assert found["shape"] == [2, 10 if family == "deit-micro" else 1000]


def test_only_families_with_pooling_or_padding_are_refused_in_bf16(partitions: dict[str, Any]) -> None:
    refused = {name for name, found in partitions.items() if "refused" in found["bf16"]}
    assert refused == {"edgenext", "efficientvit", "hgnetv2", "resnet", "resnet-swin", "swin", "swinv2"}


@pytest.mark.parametrize(
    ("card", "name"),
    [
        (Card(), "a100-80"),
        (Card(name="NVIDIA A100-SXM4-40GB", memory_mib=40960), "a100"),
        (Card(name="NVIDIA A100 80GB PCIe"), "a100-80-pcie"),
        (Card(name="NVIDIA A100-PCIE-40GB", memory_mib=40960), "a100"),
        (Card(name="NVIDIA A100-SXM-64GB", memory_mib=65536), "a100-sxm-64gb"),
        (Card(name="NVIDIA A100-SXM4-40GB MIG 3g.20gb", memory_mib=20096), "a100-mig-3g.20gb"),
        (Card(name="NVIDIA H100 PCIe", memory_mib=81559, capability="9.0"), "h100-pcie"),
        (Card(name="NVIDIA H100 NVL", memory_mib=95830, capability="9.0"), "h100-nvl"),
        (Card(name="NVIDIA H200", memory_mib=143155, capability="9.0", processors=132), "h200"),
        (Card(name="Tesla V100-SXM2-32GB", memory_mib=32510, capability="7.0"), "v100-32"),
        (Card(name="Tesla V100-PCIE-16GB", memory_mib=16160, capability="7.0"), "v100-pcie"),
        (Card(name="Tesla T4", memory_mib=15109, capability="7.5"), "t4"),
        (Card(name="Orin", memory_mib=62841, capability="8.7", processors=16), "jetson-orin"),
        (Card(name="Orin", memory_mib=15656, capability="8.7", processors=8), "jetson-orin-nx"),
        (Card(name="Orin", memory_mib=7620, capability="8.7", processors=8), "orin"),
    ],
    ids=lambda one: one.name if isinstance(one, Card) else one,
)
def test_a_card_has_the_name_of_its_family_form_and_memory(driver: Path, card: Card, name: str) -> None:
    code = "from klas_zoo.profiles.devices import resolve_device\nd = resolve_device('cuda')\n"
    found = answer(driver, f"{code}print(json.dumps([d.name, d.torch_device, d.kind, d.hardware]))", card)
    assert found[:3] == [name, "cuda", "cuda"]
    assert found[3].startswith(f"{card.name}, compute capability {card.capability}")


def test_asking_which_gpu_is_here_imports_no_torch_and_makes_no_context(driver: Path, tmp_path: Path) -> None:
    code = "import sys\nfrom klas_zoo.profiles.devices import resolve_device\nresolve_device('cuda')\n"
    card = Card(exclusive=tmp_path)
    assert answer(driver, f"{code}print(json.dumps('torch' in sys.modules))", card) is False
    assert list(tmp_path.iterdir()) == []  # where the fake driver would have locked its card


def test_another_gpu_than_the_named_one_is_reported_with_its_own_name(driver: Path) -> None:
    code = """
from klas_zoo.errors import AbsentDevice
from klas_zoo.profiles.devices import resolve_device
try:
    resolve_device('a100')
except AbsentDevice as error:
    print(json.dumps(str(error)))
"""
    assert answer(driver, code) == (
        "This machine's GPU is NVIDIA A100-SXM4-80GB, no a100: pass --device a100-80 or cuda for the one that is here, "
        "import a profile of a100 (klas-zoo profile import FILE) or add --predict."
    )


def test_a_build_for_a_device_elsewhere_computes_on_the_gpu_that_is_here_unless_asked_not_to(driver: Path) -> None:
    code = """
from pathlib import Path
from klas_zoo.costs.targets import target_device
from klas_zoo.profiles.store import ProfileStore
store = ProfileStore(Path('nowhere'))
found = [target_device('t4', store), target_device('t4', store, 'cpu'), target_device('cpu', store, 'cuda')]
print(json.dumps([[one.torch_device, one.kind, one.here, one.note] for one in found]))
"""
    there, asked, processor = answer(driver, code, Card(name="NVIDIA H100 80GB HBM3", capability="9.0"))
    assert there[:3] == ["cuda", "cpu", False]
    assert there[3] == (
        "t4 is not here: networks are tuned on this machine's NVIDIA H100 80GB HBM3, engines are checked on the CPU, "
        "and nothing is timed. To build for the GPU that is here, pass --device h100."
    )
    assert asked[:3] == ["cpu", "cpu", False]
    assert processor[:3] == ["cuda", "cpu", True]


def test_nvml_is_asked_about_the_card_that_cuda_computes_on(driver: Path) -> None:
    # NVML counts the fake cards backwards, and a card's clock names it
    code = """
from klas_zoo.profiles.devices import cuda_uuid
from klas_zoo.profiles.telemetry import Telemetry
telemetry = Telemetry(cuda_uuid())
with telemetry.watching(0.01):
    import time; time.sleep(0.2)
print(json.dumps(telemetry.conditions()))
"""
    found = answer(driver, code, Card(cards=4), CUDA_VISIBLE_DEVICES="2,3")
    assert found["sm_mhz"] == [1002, 1002]
    assert found["samples"] > 2


def test_cards_that_are_hidden_are_named_as_the_cause(driver: Path) -> None:
    code = """
from klas_zoo.errors import AbsentDevice
from klas_zoo.profiles.devices import resolve_device
try:
    resolve_device('cuda')
except AbsentDevice as error:
    print(json.dumps(str(error)))
"""
    said = answer(driver, code, CUDA_VISIBLE_DEVICES="")
    assert "CUDA_VISIBLE_DEVICES may hide it" in said and said.endswith("--device cpu works everywhere.")


def test_a_provider_that_computes_nonsense_is_found_by_running_it(driver: Path) -> None:
    # kernels of the fake driver do nothing: a real provider on a broken card would be no worse
    code = "from klas_zoo.runtimes.trial import provider_problem\nprint(json.dumps(provider_problem({!r})))"
    done = run(driver, "-c", f"import json\n{code.format(CUDA)}")
    assert "is off by" in json.loads(done.stdout.splitlines()[-1])
    assert answer(driver, code.format(CPU)) is None


def test_doctor_names_a_card_that_the_installed_onnxruntime_has_no_kernels_for(driver: Path) -> None:
    card = Card(name="NVIDIA B200", memory_mib=183359, capability="10.0")
    done = run(driver, "-m", "klas_zoo", "doctor", card=card, libraries=False)
    assert "NVIDIA B200 has compute capability 10.0, and this onnxruntime-gpu has kernels for " in done.stdout
    done = run(driver, "-m", "klas_zoo", "doctor", libraries=False)
    assert "has kernels for" not in done.stdout and "NVIDIA A100-SXM4-80GB" in done.stdout


CHECKED = """
from klas_zoo.errors import KlasZooError
from klas_zoo.profiles.devices import check_provider, resolve_device
try:
    check_provider(resolve_device('cuda'))
except KlasZooError as error:
    print(json.dumps(str(error)))
"""


def test_a_driver_older_than_the_runtime_is_named_before_anything_is_tried(driver: Path) -> None:
    assert answer(driver, CHECKED, Card(cuda="12.2")) == (
        "onnxruntime's CUDAExecutionProvider does not compute here: the NVIDIA driver runs CUDA up to 12.2, and this "
        "package was compiled for CUDA 13.0: update the driver, or install packages for CUDA 12. klas-zoo doctor lists "
        "what does not fit together."
    )
    done = run(driver, "-m", "klas_zoo", "doctor", card=Card(cuda="12.2"), libraries=False)
    assert "The driver runs CUDA up to 12.2, torch was compiled for CUDA 13.0" in " ".join(done.stdout.split())


def test_a_card_in_exclusive_mode_that_another_process_holds_is_named_as_the_cause(
    driver: Path, tmp_path: Path
) -> None:
    import fcntl

    with (tmp_path / "card-0").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        done = run(driver, "-c", f"import json\n{CHECKED}", card=Card(exclusive=tmp_path))
    said = json.loads(done.stdout.splitlines()[-1])
    assert "takes one process at a time (compute mode EXCLUSIVE_PROCESS), and another may hold it" in said
    assert "nvidia-smi -c DEFAULT lets several in. klas-zoo doctor" in said


RANK = """
import os, re, torch
from pathlib import Path
from klas_zoo.costs.targets import target_device
from klas_zoo.processes.team import join, leave
from klas_zoo.profiles.store import ProfileStore
device = target_device("cuda", ProfileStore(Path("nowhere")))
team = join(device.torch_device)
torch.zeros(8, device=device.torch_device)
team.barrier()  # both hold their cards now
links = (os.readlink(one) for one in Path("/proc/self/fd").iterdir() if one.is_symlink() and os.path.lexists(one))
print("cards", sorted({int(found[1]) for one in links if (found := re.search(r"card-([0-9]+)$", one))}), flush=True)
leave(team)
os._exit(0)
"""


def test_every_process_of_a_team_has_a_context_on_its_own_card_alone(driver: Path, tmp_path: Path) -> None:
    """Cards in exclusive mode: a context of the second process on card 0 would be an error."""
    (port,) = free_ports(1)
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "it",
              "OMP_NUM_THREADS": "1", "TORCHELASTIC_USE_AGENT_STORE": "False"}  # fmt: skip
    base = fake_cuda.environment(driver, Card(cards=2, exclusive=tmp_path)) | shared
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK], env=base | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    said = [one.communicate(timeout=300) for one in ranks]
    for number, (out, errors) in enumerate(said):
        assert f"cards [{number}]" in out, errors[-2000:]
