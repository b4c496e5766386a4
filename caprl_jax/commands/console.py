"""The console script `caprl`: the package's commands under one name."""

import runpy
import sys

from caprl_jax.commands import listing
from caprl_jax.errors import did_you_mean

_COMPLETION = """_caprl() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}"
  # Readline splits words at "=": --config=3b arrives as --config, =, 3b.
  if [ "$COMP_CWORD" -eq 1 ]; then mapfile -t COMPREPLY < <(compgen -W "{commands}" -- "$word")
  elif [ "${{COMP_LINE##* --config=}}" != "$COMP_LINE" ]; then
    mapfile -t COMPREPLY < <(compgen -W "{configs}" -- "${{word#=}}"; compgen -f -- "${{word#=}}")
  else mapfile -t COMPREPLY < <(compgen -f -- "$word")
  fi
}}
complete -F _caprl caprl"""

_MORE = """  completion    Prints the completion of bash's words.
                eval "$(caprl completion)"

Exit codes: 0 done; 1 an error, told in one paragraph; 75 stopped by SIGTERM, with a checkpoint;
76 or 134 another process of the run is gone. After 75, 76 and 134 the same command goes on."""


def main() -> None:
    """Runs `caprl COMMAND ..` as `python -m caprl_jax.COMMAND ..`; `caprl train` is main."""
    name, *rest = sys.argv[1:] or ["--help"]
    modules = {listing.console_name(c.name): c.name for c in listing.commands()}
    if name in ("-h", "--help", "help"):
        listing.show(f"{listing.as_called(listing.describe_commands())}\n\n{_MORE}")
    elif name == "completion":
        configs = " ".join(listing.shipped_configs())
        print(_COMPLETION.format(commands=" ".join([*modules, "completion"]), configs=configs))
    elif name not in modules:
        sys.exit(f"error: caprl has {did_you_mean(name, list(modules))}; caprl --help lists them")
    else:
        sys.argv = [name, *rest]
        runpy.run_module(f"caprl_jax.{modules[name]}", run_name="__main__", alter_sys=True)
