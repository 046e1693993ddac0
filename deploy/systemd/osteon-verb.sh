#!/bin/sh
# osteon-verb.sh VERB ...: runs `osteon VERB ...` by hand as the units run it: as the user osteon, with the settings and the keys
# of the site. Installed as /usr/local/bin/osteon; for root, or with sudo. Files that are named must be readable by osteon.
set -eu
terminal=--pipe
if [ -t 0 ] && [ -t 1 ]; then terminal=--pty; fi
exec systemd-run --quiet --collect --wait "$terminal" --service-type=exec \
    --uid=osteon --gid=osteon --property=SupplementaryGroups=osteon-data \
    --property=UMask=0027 --property=LimitCORE=0 --property=MemorySwapMax=0 --property=NoNewPrivileges=yes \
    --property=LoadCredential=site.key:/etc/osteon/keys/site.key \
    --property=LoadCredential=vault.key:/etc/osteon/keys/vault.key \
    --setenv=OSTEON_CONFIG=/etc/osteon/ae_config.toml --setenv=LOGNAME="${SUDO_USER:-$(id -un)}" \
    /opt/osteon/bin/osteon "$@"
