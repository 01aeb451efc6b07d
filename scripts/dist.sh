#!/usr/bin/env bash
# sdist and wheel in dist/; the wheel, which is made of the sdist, is installed into an empty environment outside the
# tree: first alone, where the README's example runs and the command line names what is missing, then with jaxmem[audit],
# where the shipped model is audited.
#
#   scripts/dist.sh [PYTHON]        an interpreter with `build`
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
rm -rf dist
"$python" -m build --outdir dist > /dev/null
wheel=$(realpath dist/*.whl)
away=$(mktemp -d)
trap 'rm -rf "$away"' EXIT
awk '/^```python$/ {inside = 1; next} /^```$/ && inside {exit} inside' README.md > "$away/example.py"

cd "$away"
"$python" -m venv environment
environment/bin/python -m pip install --quiet "$wheel"
environment/bin/python example.py | tail -n 1 | grep "estimate=250.0"
status=0
environment/bin/jaxmem --help > help 2>&1 || status=$?
[ "$status" = 2 ] # one test a line: in a list joined by && only the last one ends the script
[ "$(wc -l < help)" = 1 ]
grep "without .*tyro.* pip install 'jaxmem\[audit\]'" help

environment/bin/python -m pip install --quiet "$wheel[audit]"
environment/bin/jaxmem --help > help
environment/bin/jaxmem audit --limit 4 --noises 1 --timesteps 981 --out run 2> log || { cat log >&2; exit 1; }
[ -s run/report.html ]
[ "$(wc -l < run/results.csv)" -gt 4 ]
find environment -path '*/jaxmem/py.typed' | grep --quiet .
echo "scripts/dist.sh: $(basename "$wheel") is whole"
