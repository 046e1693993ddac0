#!/bin/sh
# osteon-verb.sh VERB ...: runs `osteon VERB ...` by hand as the units run it, in the directory of the caller and with the settings of
# the site: as the user osteon with every key of /etc/osteon/keys, but `train` and `schedule` as osteon-train without keys, and with
# /etc/osteon/trainer.toml where the trainer has settings of its own (drop-ins/database.conf). Passwords of database roles are handed
# over as in drop-ins/pgpass.conf and database.conf. Installed as /usr/local/bin/osteon; for root, or with sudo. Files that are named
# must be readable by that user.
set -eu
etc=/etc/osteon
keys=$etc/keys
unit=osteon-verb-$$
user=osteon
settings=$etc/ae_config.toml
passwords=$keys/pgpass
set -- /opt/osteon/bin/osteon "$@"
case ${2-} in
train | schedule)
    user=osteon-train
    passwords=$keys/trainer.pgpass
    if [ -e "$etc/trainer.toml" ]; then settings=$etc/trainer.toml; fi
    set -- --property=CacheDirectory=osteon-train --setenv=MPLCONFIGDIR=/var/cache/osteon-train "$@"
    ;;
*)
    for file in "$keys"/*; do
        name=${file##*/}
        case $name in
        *.key | *.passcode) set -- --property=LoadCredential="$name:$file" "$@" ;;
        *.key.cred) set -- --property=LoadCredentialEncrypted="${name%.cred}:$file" "$@" ;; # as drop-ins/encrypted-keys.conf
        esac
    done
    ;;
esac
if [ -e "$passwords" ]; then
    set -- --property=LoadCredential="pgpass:$passwords" --setenv=PGPASSFILE="/run/credentials/$unit.service/pgpass" "$@"
fi
terminal=--pipe
if [ -t 0 ] && [ -t 1 ]; then terminal=--pty; fi
# "-": a directory that the user may not enter, such as root's own, is passed over.
exec systemd-run --quiet --collect --wait "$terminal" --service-type=exec --unit="$unit" \
    --uid="$user" --gid="$user" --property=SupplementaryGroups=osteon-data --property=WorkingDirectory="-$PWD" \
    --property=UMask=0027 --property=LimitCORE=0 --property=MemorySwapMax=0 --property=NoNewPrivileges=yes \
    --setenv=OSTEON_CONFIG="$settings" --setenv=LOGNAME="${SUDO_USER:-$(id -un)}" "$@"
