"""``fedlscl completion bash|zsh``: a script that knows every command, option and method by itself.

It is printed once and asks no Python at a TAB: a parser of ours, with torch behind it, takes seconds to build.
"""

import inspect
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fedlscl import __version__, methods
from fedlscl.cli import COMMANDS
from fedlscl.cli.commands import Commands
from fedlscl.data import SpatialTemporalDataModule
from fedlscl.federated.trainer import FederatedTrainer

SHELLS = ("bash", "zsh")
TRAINED = ("fit", "validate", "test", "predict")
"""Commands with the groups trainer, method and data."""
OTHERS = {"report": ("out", "help"), "doctor": ("data_root", "config", "help")}
"""Options of the other commands that have any."""
COMMON = ("config", "help", "print_config", "seed_everything", "method", "method.help")
ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"
SCRIPT = """\
# Completion of fedlscl {version} in {shell}, printed by: fedlscl completion {shell}
{preamble}_fedlscl() {{
  local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}} command=${{COMP_WORDS[1]}}
  local method=FedLSCL words="" i
  if ((COMP_CWORD == 1)); then
    COMPREPLY=($(compgen -W "{commands} --help --version" -- "$current"))
    return
  fi
  case $previous in
    completion) words="{shells}" ;;
    --method|--method.help) words="{methods}" ;;
{values}
  esac
  if [[ -n $words ]]; then
    COMPREPLY=($(compgen -W "$words" -- "$current"))
    return
  fi
  if [[ $current != -* ]]; then
    COMPREPLY=($(compgen -f -- "$current"))
    return
  fi
  for ((i = 2; i < COMP_CWORD; i++)); do
    case ${{COMP_WORDS[i]}} in
      --config) method=$(sed -n 's/^ *class_path: *//p' "${{COMP_WORDS[i+1]}}" 2>/dev/null | tail -n 1) ;;
      --method) method=${{COMP_WORDS[i+1]}} ;;
    esac
  done
  case $command in
{options}
  esac
  case $command:${{method##*.}} in
{method_options}
    fit:*|predict:*|test:*|validate:*) words="$words {any_method}" ;;
  esac
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o filenames -F _fedlscl fedlscl
"""


def print_completion(arguments: list[str]) -> None:
    """Print the script of a shell.

    Raises:
        ValueError: if there is none for it.
    """
    if len(arguments) != 1 or arguments[0] not in SHELLS:
        raise ValueError(f"completion {' '.join(arguments)!r} is unknown: fedlscl completion bash, or zsh.")
    print(script(arguments[0]), end="")


def script(shell: str) -> str:
    """The script of a shell; zsh runs that of bash."""
    groups = {**_of_call("trainer", FederatedTrainer), **_of_call("data", SpatialTemporalDataModule)}
    of_method = {name: dict(_of_fields("method", getattr(methods, name))) for name in methods.__all__}
    of_command = {name: [*COMMON, *groups, *_of_call("", getattr(Commands, name))] for name in TRAINED} | OTHERS
    hints = {**groups, **_of_call("", Commands.fit)}
    hints |= {option: hint for options in of_method.values() for option, hint in options.items()}
    values = {option: words for option, hint in hints.items() if (words := list(_choices(hint)))}
    return SCRIPT.format(
        version=__version__,
        shell=shell,
        preamble=ZSH if shell == "zsh" else "",
        commands=" ".join(COMMANDS),
        shells=" ".join(SHELLS),
        methods=" ".join(methods.__all__),
        values="\n".join(f'    --{option}) words="{" ".join(words)}" ;;' for option, words in values.items()),
        options="\n".join(f'    {name}) words="{_flags(options)}" ;;' for name, options in of_command.items()),
        method_options="\n".join(
            f'    {"|".join(f"{command}:{name}" for command in TRAINED)}) words="$words {_flags(options)}" ;;'
            for name, options in of_method.items()
        ),
        any_method=_flags({option: None for options in of_method.values() for option in options}),
    )


def _of_call(group: str, call: Any) -> dict[str, Any]:
    """Options of a function or a constructor, with their types."""
    hints = get_type_hints(call.__init__ if inspect.isclass(call) else call)
    names = [name for name in inspect.signature(call).parameters if name not in ("self", "model", "datamodule")]
    return {f"{group}.{name}".removeprefix("."): hints[name] for name in names}


def _of_fields(group: str, kind: Any) -> Iterator[tuple[str, Any]]:
    """Options of a dataclass and of those in it, with their types."""
    hints = get_type_hints(kind)
    for field in (field for field in fields(kind) if field.init):
        name, hint = f"{group}.{field.name}", hints[field.name]
        nested = [part for part in (hint, *get_args(hint)) if is_dataclass(part)]
        if nested:
            yield from _of_fields(name, nested[0])
        else:
            yield name, hint


def _choices(hint: Any) -> Iterator[str]:
    """Values that an option can have, where they can be listed."""
    for part in (hint, *get_args(hint)):
        if get_origin(part) is Literal:
            yield from (str(value) for value in get_args(part) if isinstance(value, str | int))
    if hint is bool:
        yield from ("true", "false")


def _flags(options: Any) -> str:
    return " ".join(f"--{option}" for option in options)
