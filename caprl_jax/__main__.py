"""Prints the list of commands: python -m caprl_jax."""

from caprl_jax.commands.listing import describe_commands

if __name__ == "__main__":
    print(describe_commands())
