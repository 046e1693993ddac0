#!/bin/sh
# osteon-verb.sh VERB ...: runs `osteon VERB ...` by hand as the units run it: as the user osteon, with the settings and the keys
# of the site. Installed as /usr/local/bin/osteon; for root, or with sudo. Files that are named must be readable by osteon.
set -eu
keys=/etc/osteon/keys
if [ -e "$keys/site.key.cred" ]; then # as drop-ins/encrypted-keys.conf
    set -- --property=LoadCredentialEncrypted=site.key:"$keys/site.key.cred" \
        --property=LoadCredentialEncrypted=vault.key:"$keys/vault.key.cred" /opt/osteon/bin/osteon "$@"
else
    set -- --property=LoadCredential=site.key:"$keys/site.key" \
        --property=LoadCredential=vault.key:"$keys/vault.key" /opt/osteon/bin/osteon "$@"
fi
terminal=--pipe
if [ -t 0 ] && [ -t 1 ]; then terminal=--pty; fi
exec systemd-run --quiet --collect --wait "$terminal" --service-type=exec \
    --uid=osteon --gid=osteon --property=SupplementaryGroups=osteon-data \
    --property=UMask=0027 --property=LimitCORE=0 --property=MemorySwapMax=0 --property=NoNewPrivileges=yes \
    --setenv=OSTEON_CONFIG=/etc/osteon/ae_config.toml --setenv=LOGNAME="${SUDO_USER:-$(id -un)}" "$@"
