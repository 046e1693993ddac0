#!/bin/sh
# system-packages.sh demo | test: installs the Debian packages that the demo or the tests use, where this user may; otherwise
# says what is missing.
# Never fails for lack of them: without Orthanc the demo brings a PACS of its own, and tests that need a tool are skipped.
set -u

wanted=""
need() { # need PACKAGE COMMAND: the package is wanted when the command is not there
    command -v "$2" >/dev/null 2>&1 || wanted="$wanted $1"
}
PATH="$PATH:/usr/sbin:/sbin"
python3 -c 'import ensurepip, venv' >/dev/null 2>&1 || wanted="$wanted python3-venv"
need dcmtk storescu
need orthanc Orthanc
dicomweb=$(find /usr/share/orthanc/plugins /usr/lib/orthanc /usr/local/share/orthanc -name 'libOrthancDicomWeb*' 2>/dev/null | head -n 1)
[ -n "$dicomweb" ] || wanted="$wanted orthanc-dicomweb"
if [ "${1:-demo}" = test ]; then
    need pixelmed-apps DicomSRValidator
    need strace strace
    need prometheus promtool
    need shellcheck shellcheck
    need docker-compose docker-compose
    need systemd systemd-analyze
    need systemd-container systemd-nspawn
    need debootstrap debootstrap
    initdb=$(find /usr/lib/postgresql -path '*/bin/initdb' 2>/dev/null | head -n 1)
    [ -n "$initdb" ] || wanted="$wanted postgresql"
fi
[ -n "$wanted" ] || exit 0

root=""
if [ "$(id -u)" -ne 0 ]; then
    if command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; then root="sudo -n"; else root="no"; fi
fi
if [ "$root" = no ] || ! command -v apt-get >/dev/null 2>&1; then
    echo "Not installed (no right to, or no Debian):$wanted. Osteon works without; install them to see and test all of it." >&2
    exit 0
fi

echo "Installing Debian packages:$wanted"
log=$(mktemp)
export DEBIAN_FRONTEND=noninteractive
if $root apt-get update -qq >"$log" 2>&1 && $root apt-get install -qq -y --no-install-recommends $wanted >>"$log" 2>&1; then
    # Debian starts these services after installing them; the demo and the tests start their own, on ports of their own.
    for service in orthanc postgresql prometheus; do
        case "$wanted" in *$service*) $root systemctl disable --now $service >/dev/null 2>&1 || $root service $service stop >/dev/null 2>&1 || true ;; esac
    done
else
    echo "apt-get could not install:$wanted. Osteon works without; the end of what it said:" >&2
    tail -n 5 "$log" >&2
fi
rm -f "$log"
exit 0
