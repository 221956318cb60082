"""Concern: Slurm here can give what the launcher asks for. Torch-free.

First what its tables say, so that a refusal has a name and a number; then Slurm's own judgement, for all that only it
knows (limits of accounts, reservations, features).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from launchers.slurm.commands import NodeInfo, PartitionInfo, Slurm, SlurmError
from pretrain.config.durations import parse_duration
from pretrain.config.launch_schema import ClusterConfig, SlurmConfig
from pretrain.config.violation import did_you_mean
from pretrain.planning.preflight.cluster_facts import (
    ASK_S,
    ClusterFacts,
    gres_counts,
    memory_mb,
    wanted_gres,
)
from pretrain.planning.preflight.findings import Finding, error, ok, unknown, warning
from pretrain.planning.preflight.subject import Subject
from pretrain.planning.preflight.units import duration


def check(subject: Subject) -> Iterator[Finding]:
    """Everything about the cluster; nothing where the launcher is not Slurm."""
    launcher, cluster = subject.slurm, subject.config.cluster
    if launcher is None:
        yield from _this_host(subject)
        return
    template = list(_template(subject))
    yield from template
    try:
        facts = subject.cluster_facts()
    except SlurmError as fault:
        text, _, fix = str(fault).partition(" What to do: ")
        yield error("Slurm", text, "a Slurm cluster that answers", fix or "see there")
        return
    found = list(judge(facts, cluster, launcher))
    yield from found
    if all(finding.level != "error" for finding in [*template, *found]):
        yield _own_judgement(subject, all(node.is_usable for node in facts.nodes_of(cluster)))


def _template(subject: Subject) -> Iterator[Finding]:
    """It is read here and nowhere else: neither the nodes nor a run under way need the file."""
    from launchers.slurm.script import TemplateError

    try:
        _script(subject)
    except TemplateError as fault:
        yield error("launcher.template", str(fault), "a template that renders a batch script", "see there")


def _script(subject: Subject) -> str:
    """The batch script as it would be submitted. Raises TemplateError."""
    from launchers.slurm.submit import prepare

    place = subject.place if subject.run is not None or subject.path is not None else subject.place / "run"
    return prepare(subject.config, place).text


def _this_host(subject: Subject) -> Iterator[Finding]:
    import os

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks, threads = subject.config.launcher.num_processes, subject.config.launcher.threads_per_process or 1
    yield ok("launcher", f"local: {ranks} ranks x {threads} threads or more on {cores} CPU cores of this host")


def judge(facts: ClusterFacts, cluster: ClusterConfig, launcher: SlurmConfig) -> Iterator[Finding]:
    """What the tables say against the request, partition after partition, then its nodes."""
    partitions = facts.chosen(cluster)
    yield from _existence(facts, cluster, partitions)
    if not partitions:
        return
    limit_s = parse_duration(launcher.time_limit)
    for partition in partitions:
        yield from _limits(partition, cluster, launcher, limit_s)
    yield from _membership(facts, cluster, partitions)
    yield from _nodes(facts, cluster, launcher)


def _existence(facts: ClusterFacts, cluster: ClusterConfig, partitions: list[PartitionInfo]) -> Iterator[Finding]:
    known = ", ".join(facts.partitions) or "none"
    if cluster.partition is None:
        if not partitions:
            yield error(
                "cluster.partition",
                "null, and the cluster has no default partition",
                "a partition",
                f"cluster.partition=NAME; there are {known}",
            )
        return
    for name in (part.strip() for part in cluster.partition.split(",")):
        if name not in facts.partitions:
            close = did_you_mean(name, facts.partitions)
            hint = f"did you mean cluster.partition={close}? " if close else ""
            yield error("cluster.partition", repr(name), "a partition of the cluster", f"{hint}there are {known}")


def _limits(
    partition: PartitionInfo, cluster: ClusterConfig, launcher: SlurmConfig, limit_s: float | None
) -> Iterator[Finding]:
    what = f"partition {partition.name}"
    trouble = False
    if partition.state != "UP":
        trouble = True
        yield error(what, partition.state, "UP", "choose another cluster.partition, or wait until the site opens it")
    if limit_s is not None and partition.max_time_s is not None and limit_s > partition.max_time_s:
        trouble = True
        longest = _slurm_time(partition.max_time_s)
        yield error(
            "launcher.time_limit",
            f"{launcher.time_limit} ({duration(limit_s)})",
            f"at most {longest}, the MaxTime of {what}",
            f'launcher.time_limit="{longest}" (a longer run is queued again by itself), or another cluster.partition',
        )
    if partition.max_nodes is not None and _least_nodes(launcher) > partition.max_nodes:
        trouble = True
        yield error(
            "launcher.num_nodes",
            _asked_nodes(launcher),
            f"at most {partition.max_nodes}, the MaxNodes of {what}",
            f"launcher.num_nodes={partition.max_nodes} or fewer, or another cluster.partition",
        )
    cpus = _cpus_per_node(launcher)
    if partition.max_cpus_per_node is not None and cpus > partition.max_cpus_per_node:
        trouble = True
        yield error(
            "launcher.threads_per_process",
            f"{launcher.processes_per_node} ranks x {launcher.threads_per_process or 1} threads on a node",
            f"at most {partition.max_cpus_per_node} CPUs, the MaxCPUsPerNode of {what}",
            f"launcher.threads_per_process={max(1, partition.max_cpus_per_node // launcher.processes_per_node)}, fewer "
            "ranks on a node, or another cluster.partition",
        )
    if not trouble:
        longest = "unlimited" if partition.max_time_s is None else _slurm_time(partition.max_time_s)
        yield ok(what, f"{partition.state}, time at most {longest}, asked for {launcher.time_limit}")


def _membership(facts: ClusterFacts, cluster: ClusterConfig, partitions: list[PartitionInfo]) -> Iterator[Finding]:
    groups = _own_groups()
    for partition in partitions:
        admitted = partition.allowed_groups
        if admitted is not None and not groups.intersection(admitted):
            yield error(
                f"partition {partition.name}",
                f"it admits the groups {', '.join(admitted)}; you are in {', '.join(sorted(groups)) or 'none'}",
                "a partition that admits you",
                "choose another cluster.partition, or ask the site to admit you",
            )
        for name, value, allowed in (
            ("account", cluster.account, partition.allowed_accounts),
            ("qos", cluster.qos, partition.allowed_qos),
        ):
            if value is not None and allowed is not None and value not in allowed:
                yield error(
                    f"cluster.{name}",
                    repr(value),
                    f"one that partition {partition.name} admits: {', '.join(allowed)}",
                    f"cluster.{name}={allowed[0]}, or another cluster.partition",
                )
    if facts.associations is None:
        if cluster.account is not None or cluster.qos is not None:
            yield unknown("cluster.account, cluster.qos", "no accounting (sacctmgr) to ask; Slurm judges below")
        return
    accounts = dict.fromkeys(account for account, _, _ in facts.associations)
    if cluster.account is not None and cluster.account not in accounts:
        yield error(
            "cluster.account",
            repr(cluster.account),
            "an account of yours",
            f"cluster.account={next(iter(accounts))}; yours are {', '.join(accounts)}" if accounts else "ask the site",
        )
        return
    mine = [qos for account, _, qos in facts.associations if cluster.account in (None, account)]
    known = dict.fromkeys(name for names in mine for name in names)
    if cluster.qos is not None and known and cluster.qos not in known:
        yield error(
            "cluster.qos", repr(cluster.qos), "a QOS of your account", f"cluster.qos=NAME; yours are {', '.join(known)}"
        )
    elif cluster.account is not None or cluster.qos is not None:
        yield ok("cluster.account, cluster.qos", f"{cluster.account or 'default'}, {cluster.qos or 'default'}")


def _cpus_per_node(launcher: SlurmConfig) -> int:
    return launcher.processes_per_node * (launcher.threads_per_process or 1)


def _nodes(facts: ClusterFacts, cluster: ClusterConfig, launcher: SlurmConfig) -> Iterator[Finding]:
    nodes = facts.nodes_of(cluster)
    cpus = _cpus_per_node(launcher)
    memory = memory_mb(cluster.memory_per_node)
    if cluster.memory_per_node is not None and memory is None:
        yield error(
            "cluster.memory_per_node", repr(cluster.memory_per_node), "Slurm's form: 64G, 64000 (MB), 0 for all",
            "cluster.memory_per_node=64G, say",
        )  # fmt: skip
    try:
        gres = wanted_gres(cluster, launcher)
    except ValueError as fault:
        yield error("cluster.gres", str(fault), "such as gpu:{processes_per_node}", "correct it")
        return
    needs = f"{cpus} CPUs" + (f", {cluster.memory_per_node} memory" if memory else "")
    needs += "".join(f", {count} {name}" for name, count in gres.items())
    least = _least_nodes(launcher)
    fitting, short = {node.name for node in nodes}, False
    for field, fits, asked, offered in (
        ("launcher.num_processes", lambda node: node.cpus >= cpus, f"{cpus} CPUs", "cpus"),
        (
            "cluster.memory_per_node",
            lambda node: memory is None or node.memory_mb >= memory,
            f"{cluster.memory_per_node} ({memory or 0:.0f} MB)",
            "memory_mb",
        ),
        (
            "cluster.gres",
            lambda node: all(gres_counts(node.gres).get(name, 0) >= count for name, count in gres.items()),
            ", ".join(f"{count} x {name}" for name, count in gres.items()),
            "gres",
        ),
    ):
        enough = {node.name for node in nodes if fits(node)}
        if len(enough) < least <= len(nodes):
            short = True
            has = f"{len(enough) or 'none'} of {len(nodes)} nodes ha{'ve' if len(enough) > 1 else 's'} so much"
            yield error(
                field,
                f"{asked} on a node; {has}",
                f"{least} such nodes in {_names(facts, cluster)}, whose nodes offer {_offers(nodes, offered)}",
                "ask for less on each node (more nodes, fewer ranks), or another cluster.partition",
            )
        fitting &= enough
    together = [node for node in nodes if node.name in fitting]
    if len(together) >= least:
        yield from _readiness(together, launcher, needs)
    elif len(nodes) < least:
        excluded = f", without those in cluster.exclude ({', '.join(cluster.exclude)})" if cluster.exclude else ""
        yield error(
            "launcher.num_nodes",
            _asked_nodes(launcher),
            f"at most {len(nodes)}, the nodes of {_names(facts, cluster)}{excluded}",
            f"launcher.num_nodes={max(len(nodes), 1)} or fewer, or another cluster.partition",
        )
    elif not short:
        yield error(
            "launcher.num_nodes",
            f"{_asked_nodes(launcher)} nodes with {needs}",
            f"at most {len(together)}, the nodes of {_names(facts, cluster)} that have all of it",
            "ask for less on each node (more nodes, fewer ranks), or another cluster.partition",
        )


def _readiness(fitting: list[NodeInfo], launcher: SlurmConfig, needs: str) -> Iterator[Finding]:
    usable = [node for node in fitting if node.is_usable]
    idle, least, asked = sum("IDLE" in node.states for node in usable), _least_nodes(launcher), _asked_nodes(launcher)
    shown = f"{len(fitting)} nodes with {needs}; {len(usable)} in service, {idle} idle; asked for {asked}"
    figures = {"usable": len(usable), "idle": idle}
    if len(usable) >= least:
        yield ok("nodes", shown, **figures)
        return
    out = [
        f"{node.name} {node.state}" + (f" ({node.reason})" if node.reason else "")
        for node in fitting
        if not node.is_usable
    ]
    more = f", ... and {len(out) - 4} more" if len(out) > 4 else ""
    fix = "the job waits until nodes are back"
    if usable:
        fix += f"; launcher.num_nodes={len(usable)} with fewer ranks, or such a launcher.min_nodes, would not have to"
    found = f"{shown}; out of service: {', '.join(out[:4])}{more}"
    yield warning("nodes", found, f"{least} in service", fix, **figures)


def _least_nodes(launcher: SlurmConfig) -> int:
    """With fewer nodes the job does not start."""
    return launcher.min_nodes or launcher.num_nodes


def _asked_nodes(launcher: SlurmConfig) -> str:
    least = _least_nodes(launcher)
    return str(launcher.num_nodes) if least == launcher.num_nodes else f"{least} to {launcher.num_nodes}"


def _own_judgement(subject: Subject, all_in_service: bool) -> Finding:
    """``sbatch --test-only`` with the batch script as it would be submitted."""
    text = _script(subject)
    with tempfile.TemporaryDirectory(prefix="pretrain-preflight-") as folder:
        script = Path(folder) / "job.sbatch"
        script.write_text(text, encoding="utf-8")
        try:
            Slurm(timeout_s=ASK_S).test(script)
        except SlurmError as fault:
            said, _, fix = str(fault).replace(str(script), "JOB").partition(" What to do: ")
            # Asked so, Slurm also refuses what it would queue until nodes are back.
            waits = not all_in_service and "node configuration is not available" in said
            report = warning if fault.transient or waits else error
            if waits:
                fix = "with nodes out of service this may mean that the job would wait for them; else " + fix
            return report("sbatch --test-only", said, "a job that Slurm accepts", fix or "as it says")
    return ok("sbatch --test-only", "the batch script renders, and Slurm accepts the job")


def _own_groups() -> set[str]:
    import grp
    import os

    names = set()
    for number in {*os.getgroups(), os.getgid()}:
        try:
            names.add(grp.getgrgid(number).gr_name)
        except KeyError:
            names.add(str(number))
    return names


def _names(facts: ClusterFacts, cluster: ClusterConfig) -> str:
    return "partition " + ", ".join(partition.name for partition in facts.chosen(cluster))


def _offers(nodes: Iterable[NodeInfo], attribute: str) -> str:
    values = {getattr(node, attribute) for node in nodes}
    if attribute == "gres":
        return ", ".join(sorted(map(str, filter(None, values)))) or "none"
    unit = {"cpus": "CPUs", "memory_mb": "MB"}[attribute]
    return f"at most {max(values)} {unit}"


def _slurm_time(seconds: float) -> str:
    days, rest = divmod(round(seconds), 86400)
    hours, rest = divmod(rest, 3600)
    clock = f"{hours:02d}:{rest // 60:02d}:{rest % 60:02d}"
    return f"{days}-{clock}" if days else clock
