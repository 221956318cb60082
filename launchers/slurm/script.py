"""The batch script: a Jinja2 template and a run's configuration -> text that ``sbatch`` takes.

Faults of a template are found here, before anything is submitted, and reported with the template's file and line.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment

    from pretrain.config.schema import Config

SUPERVISOR = "launchers.slurm.job"
_IN_DIRECTIVE = re.compile(r"[\s\"'\\#]")


class TemplateError(ValueError):
    """The template of the batch script cannot be used. The message names file and line, what is there, the way out."""


@dataclass(frozen=True)
class Template:
    """Source text of a template and the file that it came from."""

    text: str
    path: Path

    @classmethod
    def read(cls, config: Config) -> Template:
        """The template of ``launcher.template``, or the shipped one. Raises TemplateError when it cannot be read."""
        path = template_path(config)
        try:
            return cls(path.read_text(encoding="utf-8"), path)
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise TemplateError(
                f"launcher.template: {path} cannot be read ({reason}); name a Jinja2 file, or launcher.template=null "
                f"for the shipped one ({shipped_template()})"
            ) from error


def shipped_template() -> Path:
    """The template beside the package, in a checkout and in a wheel alike."""
    return Path(__file__).resolve().parents[2] / "slurm" / "train.sbatch.j2"


def template_path(config: Config) -> Path:
    chosen = getattr(config.launcher, "template", None)
    return Path(chosen).expanduser().absolute() if chosen else shipped_template()


def render(
    config: Config,
    run_dir: Path,
    template: Template,
    *,
    signal_lead_s: int,
    exclude: Iterable[str] = (),
    working_dir: Path | None = None,
) -> str:
    """The batch script of a run.

    Args:
        signal_lead_s: seconds before the time limit (and before preemption) at which the supervisor is told.
        exclude: nodes at fault, besides ``cluster.exclude``.
        working_dir: where the job runs (default: here).

    Raises:
        TemplateError: naming the template's line, for a fault of the template; or the script's, when what came out
            is no batch script that starts the run.
    """
    from pretrain.config.launch_schema import SlurmConfig

    launcher, cluster = config.launcher, config.cluster
    assert isinstance(launcher, SlurmConfig)
    values: dict[str, Any] = {
        "run_dir": str(run_dir),
        "log": str(run_dir / "slurm" / "job_%j.log"),
        "job_name": run_dir.name,
        "min_nodes": launcher.min_nodes or launcher.num_nodes,
        "max_nodes": launcher.num_nodes,
        "processes_per_node": launcher.processes_per_node,
        "cpus_per_task": launcher.threads_per_process,
        "time_limit": launcher.time_limit,
        "signal_lead_s": signal_lead_s,
        "gres": cluster.gres.replace("{processes_per_node}", str(launcher.processes_per_node))
        if cluster.gres
        else None,
        "exclude": sorted({*cluster.exclude, *exclude}),
        "can_requeue": launcher.requeue_by == "requeue",
        "working_dir": str((working_dir or Path.cwd()).absolute()),
        "python": cluster.python or sys.executable,
        "environment": rank_variables(config),
        "launcher": launcher,
        "cluster": cluster,
    }
    _check_paths(values)
    return _checked(_render(template, values), template.path)


def rank_variables(config: Config) -> dict[str, str]:
    """Variables of ``cluster.environment``, and what names the network interface to NCCL and gloo."""
    cluster = config.cluster
    variables = {}
    if cluster.network_interface:
        variables = dict.fromkeys(("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"), cluster.network_interface)
    return variables | {str(name): _as_text(value) for name, value in cluster.environment.items()}


def _as_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else "" if value is None else str(value)


def _check_paths(values: Mapping[str, Any]) -> None:
    """``#SBATCH`` lines know no quoting that all releases share: paths in them must be plain words."""
    for name, what in (("run_dir", "the run directory"), ("working_dir", "the folder you are in")):
        if "%" in values[name] or _IN_DIRECTIVE.search(values[name]):
            raise TemplateError(
                f"{what} is {values[name]!r}: #SBATCH lines take no blanks, quotes, '#', '\\' or '%' in a path; choose "
                "another folder (--run-dir, run.root)"
            )


def _environment() -> Environment:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=False
    )
    environment.filters["quote"] = lambda value: shlex.quote(_as_text(value))
    return environment


def _render(template: Template, values: Mapping[str, Any]) -> str:
    from jinja2 import TemplateSyntaxError

    environment = _environment()
    try:
        code = environment.compile(template.text, filename=str(template.path))
        loaded = environment.template_class.from_code(environment, code, environment.make_globals(None))
        return loaded.render(values)
    except TemplateSyntaxError as error:
        raise _fault(template, error.lineno, error.message or "syntax error") from error
    except Exception as error:  # whatever an expression of the template raises is the template's fault
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(template.path) and frame.lineno]
        known = ", ".join(sorted(values)) if "undefined" in str(error) else ""
        message = f"{error}" + (f" (there are: {known})" if known else "")
        raise _fault(template, lines[-1] if lines else None, message) from error


def _fault(template: Template, line: int | None, message: str) -> TemplateError:
    source = template.text.splitlines()
    shown = f"\n  {line} | {source[line - 1].rstrip()}" if line and line <= len(source) else ""
    where = f"{template.path}, line {line}" if line else str(template.path)
    return TemplateError(
        f"{where}: {message}{shown}\nNothing was submitted. Correct the template, or launcher.template=null for the "
        "shipped one."
    )


def _checked(text: str, path: Path) -> str:
    """The script, if sbatch and bash will read it as meant. All faults together."""
    lines = text.splitlines()
    faults = []
    if not lines or not lines[0].startswith("#!") or "#SBATCH" in lines[0]:
        faults.append((1, "the first line must name the shell and nothing else, such as #!/bin/bash"))
    command = next((n for n, line in enumerate(lines, 1) if line.strip() and not line.startswith("#")), len(lines) + 1)
    faults += [
        (n, f"an #SBATCH line after the first command (line {command}), which Slurm does not read")
        for n, line in enumerate(lines, 1)
        if line.startswith("#SBATCH") and n > command
    ]
    code = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    code = code.replace("\\\n", " ")  # a command may go on in the next line
    if SUPERVISOR not in code:
        faults.append((len(lines), f"the script never starts `python -m {SUPERVISOR} RUN_DIR`"))
    elif not re.search(rf"^\s*exec\b.*{re.escape(SUPERVISOR)}", code, re.MULTILINE):
        faults.append((len(lines), f"{SUPERVISOR} must be started with `exec`, or Slurm's signals do not reach it"))
    if lines and re.match(r"#!\s*(/usr)?/bin/(env\s+)?(ba)?sh\b", lines[0]):
        faults += _shell_faults(text)
    if faults:
        shown = "".join(
            f"\n  line {n}: {what}" + (f"\n    | {lines[n - 1]}" if 0 < n <= len(lines) else "")
            for n, what in sorted(faults)
        )
        raise TemplateError(
            f"{path}: the batch script that it renders cannot be submitted (lines of the script):{shown}\n"
            "Nothing was submitted. Correct the template, or cluster.setup and cluster.sbatch_options; `--dry-run` "
            "shows the script."
        )
    return text


def _shell_faults(text: str) -> list[tuple[int, str]]:
    try:
        result = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []  # no bash to ask
    found = re.findall(r"line (\d+): (.*)", result.stderr)
    return [(int(number), message) for number, message in found if "`" not in message[:1]][:3]
