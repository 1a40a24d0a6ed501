# shellcheck shell=bash
# Sourced by the other scripts: flags, and commands that are printed or run.

DRY_RUN=${DRY_RUN:-}

# Prints the comment at the top of the script, and ends.
usage() {
  sed -n '2,/^[^#]/p' "$0" | grep '^#' | cut -c3-
  exit "${1:-2}"
}

fail() {
  echo "$(basename "$0"): $*" >&2
  exit 2
}

need() {  # NAME VALUE REMEDY
  [ -n "$2" ] || fail "$1 is wanted: $3"
}

# An option that wants a value has one.
valued() {
  case ${1:-} in
    --dry-run | --spot | --queued | --help | -h | --) ;;
    --*) [ $# -ge 2 ] || fail "$1 wants a value" ;;
  esac
}

# One word as bash would read it again, without quotes where none are wanted.
quoted() {
  local word
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then printf '%s ' "$word"; else printf "'%s' " "${word//\'/\'\\\'\'}"; fi
  done
}

# Runs a command, or prints it with --dry-run.
do_() {
  if [ -n "$DRY_RUN" ]; then
    local line
    line=$(quoted "$@")
    echo "${line% }"
  else
    "$@"
  fi
}
