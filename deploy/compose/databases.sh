#!/bin/sh
# databases.sh: run once by the PostgreSQL image, on an empty volume: two databases of the node, and a role for the trainer.
# What the trainer may do is said in postgresql/roles.sql, which is run when the tables are there.
set -eu
psql --set=ON_ERROR_STOP=1 --username="${POSTGRES_USER:-postgres}" --dbname=postgres \
    --set=node="$(cat /run/secrets/node_password)" --set=trainer="$(cat /run/secrets/trainer_password)" <<'SQL'
CREATE ROLE osteon LOGIN PASSWORD :'node';
CREATE ROLE osteon_trainer LOGIN PASSWORD :'trainer';
CREATE DATABASE osteon OWNER osteon;
CREATE DATABASE osteon_vault OWNER osteon;
REVOKE CONNECT ON DATABASE osteon, osteon_vault FROM PUBLIC;
GRANT CONNECT ON DATABASE osteon TO osteon_trainer;
SQL
