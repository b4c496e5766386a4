"""Prints the list of commands: python -m caprl_jax."""

from caprl_jax.commands.listing import describe_commands, show

if __name__ == "__main__":
    show(describe_commands())
