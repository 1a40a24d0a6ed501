#!/usr/bin/env bash
# Brings a run back by itself: the same command again after a preemption (exit code 75), a lost peer (134) or a kill
# (137, 143), until it is done or refused.
#
#   launch/babysit.sh [--dry-run] [--times N] [--pause SECONDS] [--log FILE] -- COMMAND ...
#
# --times: starts at most (default 50). --pause: seconds before the second start (default 5), doubled each time up to
# five minutes; a start that lasted ten minutes begins again with the first. Exit code 0, 2 (bad input) and whatever
# else is final: it is the last start's. The last message of every start that ended stands in the log.
set -uo pipefail
cd_before=$(pwd)
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
times=50 pause=5 log=babysit.log
while [ $# -gt 0 ]; do
  valued "$@"
  case $1 in
    --dry-run) DRY_RUN=1 ;;
    --times) times=$2; shift ;;
    --pause) pause=$2; shift ;;
    --log) log=$2; shift ;;
    --) shift; break ;;
    -h | --help) usage 0 ;;
    *) fail "$1 is no option; the command stands behind --" ;;
  esac
  shift
done
[ $# -gt 0 ] || usage
[[ $times =~ ^[0-9]+$ && $times -gt 0 ]] || fail "--times $times: a whole number above 0 is wanted"
[[ $pause =~ ^[0-9]+$ ]] || fail "--pause $pause: whole seconds are wanted"
if [ -n "$DRY_RUN" ]; then
  do_ "$@"
  exit 0
fi
cd "$cd_before" || exit 2
stopped='' child=''
# shellcheck disable=SC2329  # by the trap
stop() {
  stopped=1
  [ -n "$child" ] && kill -TERM "$child" 2>/dev/null
}
trap stop TERM INT
wait_for=$pause code=1
for ((start = 1; start <= times; start++)); do
  begun=$SECONDS last=$(mktemp)
  "$@" > >(tee "$last") 2>&1 &
  child=$!
  wait "$child"
  code=$?
  [ -n "$stopped" ] && { wait "$child"; code=$?; }
  sleep 0.2  # for tee's last line
  echo "$(date -u +%FT%TZ) start $start ended with $code after $((SECONDS - begun)) s: $(grep -v '^[[:space:]]*$' "$last" | tail -n 1 | cut -c1-300)" >>"$log"
  rm -f "$last"
  case $code in
    75 | 134 | 137 | 143) ;;
    *) exit $code ;;
  esac
  [ -n "$stopped" ] && exit $code
  [ $((SECONDS - begun)) -ge 600 ] && wait_for=$pause
  if [ "$start" -lt "$times" ]; then
    sleep "$wait_for" &
    wait $!
    [ -n "$stopped" ] && exit $code
    wait_for=$((wait_for * 2 > 300 ? 300 : wait_for * 2))
  fi
done
echo "babysit.sh: given up after $times starts; $log has the last message of each" >&2
exit "$code"
