#!/usr/bin/env bash
# Unpacks clang from the packages of Debian or Ubuntu into build/clang, for tests/msl. Installs nothing, needs no root.
set -euo pipefail
cd "$(dirname "$0")/../.."
if compgen -G "build/clang/usr/lib/llvm-*/bin/clang" >/dev/null; then
  exit
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 19 20 21 18; do
  if (cd "$folder" && apt-get -qq -o APT::Sandbox::User=root download "clang-$version" "libclang-cpp$version" "libllvm$version"); then
    mkdir -p build/clang
    for package in "$folder"/*.deb; do
      dpkg -x "$package" build/clang
    done
    exit
  fi
done
echo "tests/msl/clang.sh: found no packages of clang 18 to 21; is this Debian or Ubuntu, with package lists?" >&2
exit 1
