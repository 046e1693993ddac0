#!/bin/sh
# osteon-verb.sh VERB ...: runs `osteon VERB ...` by hand as the units run it, with the settings of the site: as the user osteon with
# every key of /etc/osteon/keys, but `train` and `schedule` as osteon-train without keys. Installed as /usr/local/bin/osteon; for
# root, or with sudo. Files that are named must be readable by that user.
set -eu
keys=/etc/osteon/keys
user=osteon
set -- /opt/osteon/bin/osteon "$@"
case ${2-} in
train | schedule)
    user=osteon-train
    set -- --property=CacheDirectory=osteon-train --setenv=MPLCONFIGDIR=/var/cache/osteon-train "$@"
    ;;
*)
    for file in "$keys"/*; do
        name=${file##*/}
        case $name in
        *.key) set -- --property=LoadCredential="$name:$file" "$@" ;;
        *.key.cred) set -- --property=LoadCredentialEncrypted="${name%.cred}:$file" "$@" ;; # as drop-ins/encrypted-keys.conf
        esac
    done
    ;;
esac
terminal=--pipe
if [ -t 0 ] && [ -t 1 ]; then terminal=--pty; fi
exec systemd-run --quiet --collect --wait "$terminal" --service-type=exec \
    --uid="$user" --gid="$user" --property=SupplementaryGroups=osteon-data \
    --property=UMask=0027 --property=LimitCORE=0 --property=MemorySwapMax=0 --property=NoNewPrivileges=yes \
    --setenv=OSTEON_CONFIG=/etc/osteon/ae_config.toml --setenv=LOGNAME="${SUDO_USER:-$(id -un)}" "$@"
