#!/bin/sh
# prepare.sh DIR: writes fresh keys and passwords for deploy/compose.yaml into DIR, and DIR/env that points to them. For root: the
# files then belong to the users of the containers. It overwrites nothing. Back up site.key and vault.key, apart from the data.
set -eu
umask 077
folder=${1:?usage: prepare.sh DIR}
if [ -e "$folder" ]; then
    echo "prepare.sh: $folder is there already, and nothing is overwritten: choose another directory" >&2
    exit 2
fi
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
key() { head -c 32 /dev/urandom | base64; }
word() { head -c 24 /dev/urandom | base64 | tr '+/' '-_'; }
for name in site vault; do key >"$folder/$name.key"; done
for name in postgres node trainer; do word | tr -d '\n' >"$folder/$name.password"; done
echo "postgres:5432:*:osteon:$(cat "$folder/node.password")" >"$folder/node.pgpass"
echo "postgres:5432:*:osteon_trainer:$(cat "$folder/trainer.password")" >"$folder/trainer.pgpass"
printf 'OSTEON_SECRETS=%s\nORTHANC_PASSWORD=%s\n' "$folder" "$(word)" >"$folder/env"
if [ "$(id -u)" -eq 0 ]; then
    chown 10001:10001 "$folder/site.key" "$folder/vault.key" "$folder/node.pgpass"
    chown 10002:10001 "$folder/trainer.pgpass"
    chown 999:999 "$folder/postgres.password" "$folder/node.password" "$folder/trainer.password"
    chmod 711 "$folder" # the containers reach their files by name; each file is its owner's alone
else
    echo "prepare.sh: not root: give site.key, vault.key and node.pgpass to uid 10001, trainer.pgpass to 10002, *.password to 999" >&2
fi
echo "Keys and passwords are in $folder; docker compose --env-file $folder/env -f deploy/compose.yaml up -d"
