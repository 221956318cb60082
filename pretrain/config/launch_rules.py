"""Rules of launchers and of what a site asks of its jobs. Torch-free."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Any, Final

from pretrain.config.durations import parse_duration
from pretrain.config.engine_rules import LAYOUT
from pretrain.config.violation import Violation

_SBATCH_OWN: Final = {
    "job-name": "run.name",
    "nodes": "launcher.num_nodes",
    "ntasks": "launcher.num_processes",
    "ntasks-per-node": "launcher.num_processes",
    "cpus-per-task": "launcher.threads_per_process",
    "time": "launcher.time_limit",
    "requeue": "launcher.requeue_by",
    "no-requeue": "launcher.requeue_by",
    "account": "cluster.account",
    "partition": "cluster.partition",
    "qos": "cluster.qos",
    "constraint": "cluster.constraint",
    "reservation": "cluster.reservation",
    "gres": "cluster.gres",
    "mem": "cluster.memory_per_node",
    "exclude": "cluster.exclude",
    "output": "",
    "open-mode": "",
    "chdir": "",
    "signal": "",
    "no-kill": "",
    "array": "",
    "wrap": "",
    "wait": "",
    "parsable": "",
    "test-only": "",
}
"""Options of sbatch that are set elsewhere: by a field, or ("") by the platform, which relies on them."""

_SRUN_OWN: Final = dict.fromkeys(
    [
        "nodes",
        "nodelist",
        "ntasks",
        "ntasks-per-node",
        "output",
        "error",
        "open-mode",
        "kill-on-bad-exit",
        "no-kill",
        "wait",
        "job-name",
        "input",
        "label",
        "distribution",
        "multi-prog",
    ],
    "",
)
_SHORT: Final = {
    "-J": "job-name",
    "-N": "nodes",
    "-n": "ntasks",
    "-c": "cpus-per-task",
    "-t": "time",
    "-A": "account",
    "-p": "partition",
    "-q": "qos",
    "-C": "constraint",
    "-x": "exclude",
    "-o": "output",
    "-D": "chdir",
    "-a": "array",
    "-W": "wait",
    "-k": "no-kill",
    "-w": "nodelist",
    "-K": "kill-on-bad-exit",
    "-i": "input",
    "-l": "label",
    "-m": "distribution",
}
_CONTRACT: Final = ("SLURM_", "PRETRAIN_ATTEMPT", "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK")


def _spread_evenly(num_processes: int, num_nodes: int) -> Iterator[Violation]:
    if num_processes % num_nodes:
        lower = num_processes // num_nodes * num_nodes
        near = [n for n in (lower, lower + num_nodes) if n > 0]
        yield Violation(
            "launcher.num_processes",
            num_processes,
            f"a multiple of launcher.num_nodes = {num_nodes}: each node has as many ranks",
            "nearest: " + " or ".join(f"launcher.num_processes={n}" for n in near),
        )


def _fewer_nodes_fit(
    min_nodes: int | None,
    num_nodes: int,
    num_processes: int,
    tensor: int,
    pipeline: int,
    global_batch: int,
    micro_batch: int,
) -> Iterator[Violation]:
    """Elastic runs: the smallest layout must be one that the run can have; those between are taken where they fit."""
    if min_nodes is None or num_processes % num_nodes:
        return
    if min_nodes > num_nodes:
        yield Violation(
            "launcher.min_nodes",
            min_nodes,
            f"at most launcher.num_nodes = {num_nodes}",
            f"launcher.min_nodes={num_nodes} or less, or launcher.min_nodes=null",
        )
        return

    def fits(nodes: int) -> bool:
        data, rest = divmod(nodes * (num_processes // num_nodes), tensor * pipeline)
        return not rest and global_batch % (micro_batch * data) == 0

    if fits(num_nodes) and not fits(min_nodes):
        possible = [n for n in range(1, num_nodes + 1) if fits(n)]
        yield Violation(
            "launcher.min_nodes",
            min_nodes,
            f"a number of nodes whose ranks ({min_nodes} x {num_processes // num_nodes}) the engine's layout and"
            f" train.global_batch_size = {global_batch} divide into",
            f"one of {', '.join(map(str, possible))}, or launcher.min_nodes=null",
        )


def _time_limit_is_known(time_limit: str) -> Iterator[Violation]:
    if not parse_duration(time_limit):
        yield Violation(
            "launcher.time_limit",
            time_limit,
            "a duration above zero in a form that Slurm knows: minutes, HH:MM:SS or D-HH:MM:SS",
            "launcher.time_limit=12:00:00, say; a run that needs longer is queued again by itself",
        )


def _sbatch_options_are_free(options: list[str]) -> Iterator[Violation]:
    yield from _options("cluster.sbatch_options", options, _SBATCH_OWN, "--mail-type=FAIL")


def _srun_options_are_free(options: list[str]) -> Iterator[Violation]:
    yield from _options("cluster.srun_options", options, _SRUN_OWN, "--mpi=pmix")


def _options(path: str, options: list[str], own: dict[str, str], example: str) -> Iterator[Violation]:
    for i, option in enumerate(options):
        if not option.startswith("-") or "\n" in option:
            yield Violation(
                f"{path}[{i}]", option, "one option, beginning with '-'", f"write it as one text, such as {example}"
            )
            continue
        name = _SHORT.get(option[:2], "") if not option.startswith("--") else re.split(r"[=\s]", option[2:])[0]
        # Slurm takes the beginning of an option's name for the whole.
        if name and name not in own:
            name = next((whole for whole in own if whole.startswith(name)), name)
        if name in own:
            field = own[name]
            rule = f"an option that is not set elsewhere: --{name} is {field or 'the platform'}'s"
            fix = f"set {field}" if field else "remove it"
            yield Violation(f"{path}[{i}]", option, rule, fix)


def _environment_is_free(environment: dict[str, Any]) -> Iterator[Violation]:
    for name, value in environment.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", str(name)):
            rule, fix = "a variable's name: letters, digits and '_'", "rename or remove it"
        elif str(name).startswith(_CONTRACT):
            rule, fix = "a variable that ranks do not get from Slurm and the launcher", "remove it"
        elif isinstance(value, dict | list):
            rule, fix = "one value for a variable: text, a number, true or false", "write the value as text"
        else:
            continue
        yield Violation(f"cluster.environment.{name}", value, rule, fix)


def _gres_is_known(gres: str | None) -> Iterator[Violation]:
    if gres is not None and re.search(r"[{}\s]", gres.replace("{processes_per_node}", "")):
        yield Violation(
            "cluster.gres",
            gres,
            "a text for --gres without blanks; {processes_per_node} is the only placeholder",
            "cluster.gres='gpu:{processes_per_node}', say",
        )


def _memory_is_known(memory: str | None) -> Iterator[Violation]:
    if memory is not None and not re.fullmatch(r"\d+[KMGTkmgt]?", memory):
        yield Violation(
            "cluster.memory_per_node", memory, "a number with K, M, G or T (MB without), or 0 for all", "64G, say"
        )


def _container_is_a_command(container: str | None) -> Iterator[Violation]:
    if container is None:
        return
    try:
        words = shlex.split(container)
    except ValueError as error:
        yield Violation("cluster.container", container, f"a command line ({error})", "close the quotes")
        return
    if not words:
        yield Violation("cluster.container", container, "a command, or null for none", "cluster.container=null")


def _plain_words(path: str, what: str) -> Any:
    def rule(value: str | None) -> Iterator[Violation]:
        if value is not None and not re.fullmatch(r"[^\s'\"\\#]+", value):
            yield Violation(path, value, f"{what}, one word without quotes", f"correct it, or {path}=null")

    return rule


def _interpreter_is_contained(python: str | None, container: str | None, options: list[str]) -> Iterator[Violation]:
    if python is not None and container is None and not options:
        yield Violation(
            "cluster.container_python",
            python,
            "null: ranks run in no container (cluster.container, or one of cluster.srun_options)",
            "cluster.python for the interpreter on the nodes",
        )


def _each_matches(path: str, pattern: str, what: str, fix: str) -> Any:
    def rule(entries: list[str]) -> Iterator[Violation]:
        for i, entry in enumerate(entries):
            if not re.fullmatch(pattern, entry):
                yield Violation(f"{path}[{i}]", entry, what, fix)

    return rule


_excluded_are_names = _each_matches(
    "cluster.exclude",
    r"[^\s,\[\]'\"]+",
    "the name of one node",
    "give each node its own entry; `scontrol show hostnames 'n[1-3]'` writes a list out",
)
_modules_are_words = _each_matches(
    "cluster.modules", r"\S+", "the name of one module", "give each module its own entry"
)


LAUNCH_RULES: Final[tuple[tuple[tuple[str, ...], Any], ...]] = (
    (("launcher.num_processes", "launcher.num_nodes"), _spread_evenly),
    (
        (
            "launcher.min_nodes?",
            "launcher.num_nodes",
            "launcher.num_processes",
            *LAYOUT,
            "train.global_batch_size",
            "train.micro_batch_size",
        ),
        _fewer_nodes_fit,
    ),
    (("launcher.time_limit",), _time_limit_is_known),
    (("cluster.sbatch_options",), _sbatch_options_are_free),
    (("cluster.srun_options",), _srun_options_are_free),
    (("cluster.environment",), _environment_is_free),
    (("cluster.gres",), _gres_is_known),
    (("cluster.memory_per_node",), _memory_is_known),
    (("cluster.container",), _container_is_a_command),
    (("cluster.container_python", "cluster.container", "cluster.srun_options"), _interpreter_is_contained),
    (("cluster.exclude",), _excluded_are_names),
    (("cluster.modules",), _modules_are_words),
    *(
        ((f"cluster.{name}",), _plain_words(f"cluster.{name}", what))
        for name, what in (
            ("account", "an account"),
            ("partition", "a partition, or several with commas"),
            ("qos", "a QOS"),
            ("constraint", "features"),
            ("reservation", "a reservation"),
            ("container_python", "an interpreter"),
            ("network_interface", "an interface of the nodes, such as ib0"),
        )
    ),
)
"""(paths of the values a rule takes, the rule); a path that ends in ``?`` may be absent and is None then."""
