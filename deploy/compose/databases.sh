#!/bin/sh
# databases.sh: run once by the PostgreSQL image, on an empty volume: the databases and roles of postgresql/roles.sql, with the
# passwords that prepare.sh made.
set -eu
node=$(cat /run/secrets/node_password)
trainer=$(cat /run/secrets/trainer_password)
administrator() { psql --no-psqlrc --set=ON_ERROR_STOP=1 --username="${POSTGRES_USER:-postgres}" --dbname=postgres "$@"; }
administrator --file=/osteon/roles.sql
administrator --set=node="$node" --set=trainer="$trainer" <<'SQL'
ALTER ROLE osteon PASSWORD :'node';
ALTER ROLE osteon_trainer PASSWORD :'trainer';
SQL
