# shellcheck shell=bash
# Sourced by the other scripts: what the exit codes of a run's processes come to.

# Usage: exit_code CODES      (one a line; none of a process that is gone)
# An error of one process's own (1, 2) ends the others in other ways; so may one that was told to
# stop (75). Anything else but 0, and nothing at all, is a lost process: 76.
exit_code() {
  local code
  for code in 1 2 75; do
    if grep -qx "$code" <<< "$1"; then echo "$code"; return; fi
  done
  if [ -n "$1" ] && ! grep -qvx 0 <<< "$1"; then echo 0; else echo 76; fi
}
