"""What the packages' source may not contain: any way to run, unpickle or interpret data."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "globals", "execfile", "import_module", "system", "popen", "score_answer",
    "unsafe_load", "full_load", "format_map",
}  # fmt: skip
# A reward function is imported by the name that a person gives. No manifest names one: `node.swarm.agreed_tasks` takes
# functions from the joiner's own configuration alone (test_node_tasks_rewards.py).
NAMED_BY_A_PERSON = {"node/tasks/rewards/functions.py": ["importlib.import_module(spec.where)"]}
# Called in a cage alone, of sets whose scorer evaluates no text (test_node_tasks_reasoning_gym.py).
IN_A_CAGE = {
    "node/tasks/reasoning_gym/data_sets.py": [
        "data_set.score_answer(request['answer'], entry=json.loads(request['entry']))"
    ],
}
METHODS = {"eval", "compile"}  # model.eval(), re.compile(): harmless as methods, not as built-in functions
FORBIDDEN_MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "yaml",
    "runpy",
    "code",
}


def dangers(source: str) -> list[str]:
    """List what in `source` runs, unpickles or interprets data."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FORBIDDEN_MODULES:
            found.append(str(node.module))
        elif isinstance(node, ast.Call):
            method = isinstance(node.func, ast.Attribute)
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if name in FORBIDDEN_CALLS and not (method and name in METHODS):
                found.append(ast.unparse(node))
            if keywords.get("shell", "False") != "False" or keywords.get("allow_pickle", "False") != "False":
                found.append(ast.unparse(node))
            if ast.unparse(node.func) == "torch.load" and keywords.get("weights_only") != "True":
                found.append(ast.unparse(node))
            if keywords.get("trust_remote_code", "False") != "False":
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize(
    "source",
    [
        "eval(text)",
        "exec(text)",
        "builtins.exec(text)",
        "__import__(name)",
        "importlib.import_module(name)",
        "import pickle",
        "from pickle import loads",
        "import yaml",
        "os.system(text)",
        "os.popen(text)",
        "subprocess.run(text, shell=True)",
        "subprocess.run(text, shell=flag)",
        "numpy.load(path, allow_pickle=True)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "data.score_answer(text, entry)",
        "text.format_map(values)",
    ],
)
def test_the_search_finds_what_it_is_for(source: str) -> None:
    assert dangers(source)


def test_the_search_lets_the_harmless_pass() -> None:
    assert not dangers("model.eval(); re.compile(p); torch.load(p, weights_only=True); subprocess.run([a]); f'{text}'")


@pytest.mark.parametrize("package", ["node", "protocol", "collectives"])
def test_nothing_in_the_packages_can_run_text(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    found = {str(path.relative_to(ROOT)): dangers(path.read_text()) for path in files}
    known = NAMED_BY_A_PERSON | IN_A_CAGE
    named = {path: calls for path, calls in known.items() if path.startswith(package)}
    assert {path: calls for path, calls in found.items() if calls} == named
