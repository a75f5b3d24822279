"""The bill of materials: what a node needs, whatever else is installed here."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

REQUIRES = {
    "gossamer": [
        "Ring[fast]>=1",
        "chart; extra == 'plots'",
        "pytest; extra == 'dev'",
        "win; sys_platform == 'nowhere'",
    ],
    "ring": ["Deep_Down", "speed; extra == 'fast'", "slow; extra == 'docs'"],
    "speed": ["ring[fast]"],  # and back again
    "deep-down": None,
}


@pytest.fixture(scope="module")
def sbom() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sbom", Path(__file__).parents[2] / ".ci" / "sbom.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_node_needs_what_its_packages_want_with_the_extras_asked_for_and_no_extra_of_its_own(
    sbom: ModuleType,
) -> None:
    assert sbom.needed(REQUIRES.__getitem__) == {"ring", "deep-down", "speed"}


def test_the_list_keeps_what_is_needed_and_leads_to_nothing_that_it_left_out(sbom: ModuleType) -> None:
    names = ("Ring", "Deep_Down", "speed", "pytest")
    bom = {
        "bomFormat": "CycloneDX",
        "metadata": {"component": {"bom-ref": "root", "name": "gossamer"}},
        "components": [
            {"bom-ref": f"{name}==1", "name": name, "licenses": [{"license": {"id": "MIT"}}]} for name in names
        ],
        "dependencies": [
            {"ref": "root", "dependsOn": ["Ring==1", "pytest==1"]},
            {"ref": "Ring==1", "dependsOn": ["Deep_Down==1", "speed==1"]},
            {"ref": "speed==1"},
            {"ref": "pytest==1", "dependsOn": ["Ring==1"]},
        ],
    }
    kept = sbom.keep_needed(bom, {"ring", "deep-down"})
    assert kept["bomFormat"] == "CycloneDX" and kept["metadata"] == bom["metadata"]
    assert [entry["name"] for entry in kept["components"]] == ["Ring", "Deep_Down"]
    assert kept["components"][0] == bom["components"][0]
    assert kept["dependencies"] == [
        {"ref": "root", "dependsOn": ["Ring==1"]},
        {"ref": "Ring==1", "dependsOn": ["Deep_Down==1"]},
    ]


def test_what_gossamer_is_installed_with_here_needs_torch_and_no_pytest(sbom: ModuleType) -> None:
    names = sbom.needed(sbom.requires)
    assert {"torch", "numpy", "pyzmq", "cryptography"} <= names and not {"pytest", "ruff", "gossamer"} & names
