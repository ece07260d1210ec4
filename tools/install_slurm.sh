#!/usr/bin/env bash
# Debian's Slurm, for `make test-slurm`: as little of it as a cluster needs. Nothing is started. Does nothing if all is
# there.
set -euo pipefail
packages=(slurm-wlm munge shellcheck iproute2 util-linux)

missing=()
for package in "${packages[@]}"; do
    dpkg-query --show --showformat='${Status}' "$package" 2>/dev/null | grep -q '^install ok installed$' ||
        missing+=("$package")
done
if ((${#missing[@]} == 0)); then
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
