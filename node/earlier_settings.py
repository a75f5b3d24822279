"""Settings of earlier releases: what each is called today, or what holds in its place.

A node's record of its settings is translated (`upgraded`). A person who writes an older name is told today's
(`node.config`). To rename or remove a setting, add it to `RENAMED_SETTINGS` or `REMOVED_SETTINGS`, and to
tests/unit/test_node_config.py.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

REMOVED_SETTINGS: Mapping[str, str] = {
    "sampling.probe": "peers' groups are drawn alike, whoever signed them: leave it out",
    "sampling.external_negatives": "leave it out; the rule 'positive' pushes no peer's answer down",
    "trainer.beta": "it could only be 0, as no reference model is kept: leave it out",
    "trainer.adam_beta1": "it is 0.9: leave it out",
    "trainer.force_learning_rate": "a rate that is too high for a model is taken, and warned of: leave it out",
    "network.share": "groups whose rewards are all equal teach nothing and are not sent: leave it out",
    "network.timing": "it follows from network.listen: leave it out",
    "weights.encrypt": "what members send each other is always encrypted: leave it out",
    "engine.vllm.tensor_parallel_size": "vLLM takes all GPUs of engine.placement for one model: leave it out",
    "engine.vllm.kv_cache_gib": "on a processor vLLM has 1 GiB for it: leave it out",
    "engine.vllm.max_model_len": "it is the longest prompt and the longest completion together: leave it out",
    "engine.vllm.enforce_eager": "CUDA graphs are used on a GPU and nowhere else: leave it out",
    "engine.vllm.start_timeout": "engine.timeout bounds it: leave it out",
    "engine.vllm.call_timeout": "engine.timeout bounds it: leave it out",
    "engine.vllm.dtype": "an engine that takes whole weights has them in bfloat16: leave it out",
    "engine.vllm.logprob_tolerance": "it is 0.1 nats a token: leave it out",
    "network.max_peers": "a node has 16 links, or 12 in a swarm of more nodes than that: leave it out",
    "network.store_memory": "it is 256 MiB, or twice the swarm's largest group: leave it out",
    "network.store_disk": "it is 4 GiB: leave it out",
    "weights.outer_lr": "it is that of weights.mode ('diloco' 0.7, 'async-diloco' 0.4, 'average' 1): leave it out",
    "weights.momentum": "it is that of weights.mode ('diloco' 0.9, 'async-diloco' 0.5): leave it out",
    "weights.seeds": "members find each other by the swarm's records: leave it out",
    "weights.streams": "it is 1: leave it out",
    "pool.max_peer_share": "one peer may fill half of the buffer: leave it out",
    "eval.ends": "set eval.every='ends' instead",
    "eval.seed": "it is 0, so that all nodes of a swarm ask the same questions: leave it out",
    "rollout_log.own": "two own groups a round are kept: leave it out",
    "rollout_log.external": "one group of a peer's is kept a round: leave it out",
    "rollout_log.max_bytes": "rollouts.jsonl has 8 MiB, and one older file: leave it out",
    "journal.max_bytes": "rounds.journal has 64 MiB, and one older file: leave it out",
}
"""Settings of earlier releases, by dotted key. A node's record drops them; a person who sets one is told what to do."""
TRL_OPTIONS: Mapping[str, Any] = {
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "optim": "adamw_torch_fused",
    "adam_beta2": 0.99,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "loss_type": "dapo",
    "importance_sampling_level": "token",
    "mask_truncated_completions": False,
    "epsilon": 0.2,
    "epsilon_high": 0.28,
    "scale_rewards": "none",
    "vllm_importance_sampling_correction": True,
    "vllm_importance_sampling_mode": "token_truncate",
    "vllm_importance_sampling_clip_max": 2.0,
    "off_policy_mask_threshold": None,
    "save_total_limit": 2,
    "report_to": [],
}
"""Options of `trainer.trl` that were settings of `trainer`, and what they were where nobody set them."""
RENAMED_SETTINGS: Mapping[str, str] = {
    **{f"trainer.{name}": f"trainer.trl.{name}" for name in TRL_OPTIONS},
    **{f"pool.{name}": f"buffer.{name}" for name in ("max_age", "max_age_rounds", "max_groups", "max_bytes")},
}
"""Settings that have another name today, by the dotted key of then."""
REMOVED_TABLES = ("rollout_log", "journal", "pool")  # none of whose settings has its name of then
REMOVED_RULES: Mapping[str, str] = {"paper": "sapo", "uniform": "sapo", "correct": "positive"}
"""What `sampling.rule` could be in earlier releases, and what comes nearest today."""


def _in_one_list(placement: Mapping[str, Any]) -> Any:
    """Return the list that is meant by { devices = [...], url = [...] }; another table as it is."""
    devices, url = placement.get("devices") or [], placement.get("url") or []
    return placement if placement.keys() - {"devices", "url"} or (devices and url) else devices or url


TRANSLATED: Mapping[str, Callable[[Any], Any]] = {
    "sampling.rule": lambda rule: REMOVED_RULES.get(rule, rule) if isinstance(rule, str) else rule,
    "sampling.max_surprise": lambda bound: 0.0 if bound is None else bound,
    "engine.placement": lambda placement: _in_one_list(placement) if isinstance(placement, dict) else placement,
}
"""What the values of a setting in a record mean today, by its dotted key."""


def upgraded(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a node's record of its settings, whichever version wrote it, in today's words and with the same meaning.

    For what a program wrote: a person who writes an old word is told today's.
    """
    now = copy.deepcopy(dict(tree))
    for key, translate in TRANSLATED.items():
        table, name = _place_of(now, key)
        if name in table:
            table[name] = translate(table[name])
    evaluated, _ = _place_of(now, "eval.every")
    if evaluated.get("ends") is True and not evaluated.get("every"):
        evaluated["every"] = "ends"
    for key in (*REMOVED_SETTINGS, "trainer.gradient_accumulation_steps"):  # now tokens_per_batch splits a round
        table, name = _place_of(now, key)
        table.pop(name, None)
    for key, todays in RENAMED_SETTINGS.items():
        table, name = _place_of(now, key)
        value = table.pop(name, None)
        if value is not None and value != TRL_OPTIONS.get(name):
            table, name = _place_of(now, todays, make=True)
            table[name] = value
    for name in REMOVED_TABLES:
        if now.get(name) == {}:
            del now[name]
    tasks = now.get("tasks")
    for task in tasks if isinstance(tasks, list) else []:
        if isinstance(task, dict) and task.get("name") == "jsonl":
            task["name"] = "dataset"
    return now


def gone_settings(tree: Mapping[str, Any]) -> dict[str, str]:
    """Return which settings of a record have no effect any more, by dotted key, and what is said of each."""
    gone = {}
    for key, said in REMOVED_SETTINGS.items():
        table, name = _place_of(tree, key)
        if table.get(name) is not None and key != "eval.ends":  # which `upgraded` translates
            gone[key] = said
    return gone


def _place_of(tree: Mapping[str, Any], key: str, *, make: bool = False) -> tuple[dict[str, Any], str]:
    """Return the table in `tree` that dotted `key` is in, and the key's last part.

    Where there is no such table it is an empty one, which `make` puts into `tree`.
    """
    *tables, last = key.split(".")
    table: Any = tree
    for name in tables:
        table = (table.setdefault(name, {}) if make else table.get(name)) if isinstance(table, dict) else None
    return (table if isinstance(table, dict) else {}), last
