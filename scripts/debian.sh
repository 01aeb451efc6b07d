#!/usr/bin/env bash
# The newest of everything: a target of the Makefile in a fresh clone of HEAD in a root of Debian 13, with Debian's
# Python and what pip takes there today, without torch.
#
#   scripts/debian.sh                 the fast tests
#   scripts/debian.sh demo            or any other target
#   SUITE=forky scripts/debian.sh     another release of Debian: its testing one has Python 3.14
#
# The root stays in the temporary folder for the next time; the clone and its environment are made anew. What is mounted
# into the root is mounted in a namespace of its own and gone with the command, so `rm -r` of the root is safe.
set -euo pipefail
cd "$(dirname "$0")/.."
target=${1:-fast-tests}
suite=${SUITE:-trixie}
root=${TMPDIR:-/tmp}/jaxmem-debian-$suite

skip() {
  echo "scripts/debian.sh: skipped, the newest versions are not tested on this machine: $1"
  exit 0
}

[ "$(id -u)" = 0 ] || skip "only root may make a root of Debian"
command -v apt-get > /dev/null || skip "there is no apt-get, which knows Debian's mirror"
unshare --mount true 2> /dev/null || skip "there are no mount namespaces"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! command -v debootstrap > /dev/null; then
  { apt-get update && apt-get install --yes --no-install-recommends debootstrap; } > "$log" 2>&1 ||
    skip "apt-get could not install debootstrap: $(tail -n 1 "$log")"
fi
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Identifier: Packages' 'Label: Debian' | head -n 1)
[ -n "$mirror" ] || skip "apt has no mirror of Debian"

if [ ! -e "$root/made" ]; then
  rm -rf "$root"
  packages=ca-certificates,git,make,python3,python3-venv
  unshare --mount debootstrap --variant=minbase --include="$packages" "$suite" "$root" "$mirror" sid > "$log" 2>&1 ||
    skip "debootstrap of $suite: $(tail -n 1 "$log")"
  touch "$root/made"
fi
cp --dereference /etc/resolv.conf "$root/etc/resolv.conf"
echo "127.0.0.1 localhost $(hostname)" > "$root/etc/hosts" # gloo looks for the address of the host's name
rm -rf "$root/srv/jaxmem"
git clone --quiet --no-hardlinks . "$root/srv/jaxmem"

# pip finds packages as it does here: its settings, and the files and folders of this machine that they name. The files
# of a folder that is an index lie beside it.
python3 -m pip config debug | sed -nE 's/^ *(\/.*), exists: True$/\1/p' > "$log"
python3 -m pip config list | grep -oE "(file://)?/[^' ]+" | sed -E 's|^file://(.*)/[^/]+/?$|\1|' >> "$log" || true
mapfile -t paths < <(sort -u "$log")
mapfile -t environment < <(env | grep -E '^(PIP_|SSL_|REQUESTS_|OPENBLAS_|XLA_FLAGS=|TEST_XLA_FLAGS=|[a-zA-Z]+_(proxy|PROXY)=)')
enter='
  root=$1 target=$2
  shift 2
  mount --rbind /dev "$root/dev"
  for path in "$@"; do
    [ -e "$path" ] || continue
    mkdir -p "$root/$(dirname "$path")"
    if [ -d "$path" ]; then mkdir -p "$root/$path"; else touch "$root/$path"; fi
    mount --bind --read-only "$path" "$root/$path"
  done
  exec chroot "$root" make --directory /srv/jaxmem "$target" EXTRAS=test
'
env --ignore-environment HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 "${environment[@]}" \
  unshare --mount --pid --fork --kill-child --mount-proc="$root/proc" \
  bash -euc "$enter" enter "$root" "$target" "${paths[@]}"
echo "scripts/debian.sh: make $target passed on Debian $(cat "$root/etc/debian_version") in $root/srv/jaxmem"
