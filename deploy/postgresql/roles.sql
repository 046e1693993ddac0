-- The databases and roles of one Osteon site on PostgreSQL 13 or later. Run it as the administrator of the server:
--
--     psql -X -v ON_ERROR_STOP=1 -f roles.sql
--
-- It may be run again at any time: after the first start of a role of Osteon (which makes the tables), and after each upgrade, so
-- that the trainer's rights follow the tables. It sets no passwords: give them with \password, and keep them in password files.
-- Other names: -v owner=… -v trainer=… -v catalogue=… -v vault=…
--
--   owner      owns both databases: receives, replies, migrates, and runs every verb
--   trainer    trains on another host: reads what training reads, keeps its runs, their timings and its sign of life, adds to the
--              history, pauses schedules; writes no study, image, label, result, delivery or other switch, and has no way into the
--              vault's database

\if :{?owner} \else \set owner osteon \endif
\if :{?trainer} \else \set trainer osteon_trainer \endif
\if :{?catalogue} \else \set catalogue osteon_catalogue \endif
\if :{?vault} \else \set vault osteon_vault \endif

SELECT format('CREATE ROLE %I LOGIN', name) FROM unnest(ARRAY[:'owner', :'trainer']) AS name
 WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name) \gexec

-- Locale C: texts sort as Osteon sorts them, and an upgrade of the system's locales damages no index.
SELECT format('CREATE DATABASE %I OWNER %I TEMPLATE template0 ENCODING ''UTF8'' LC_COLLATE ''C'' LC_CTYPE ''C''', name, :'owner')
  FROM unnest(ARRAY[:'catalogue', :'vault']) AS name
 WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = name) \gexec

REVOKE ALL ON DATABASE :"catalogue", :"vault" FROM PUBLIC;
REVOKE ALL ON DATABASE :"vault" FROM :"trainer";
GRANT CONNECT ON DATABASE :"catalogue" TO :"trainer";

\connect :"vault"
REVOKE ALL ON SCHEMA public FROM PUBLIC;
GRANT ALL ON SCHEMA public TO :"owner";

\connect :"catalogue"
REVOKE ALL ON SCHEMA public FROM PUBLIC;
GRANT ALL ON SCHEMA public TO :"owner";
GRANT USAGE ON SCHEMA public TO :"trainer";
REVOKE ALL ON ALL TABLES IN SCHEMA public FROM :"trainer";
REVOKE ALL ON ALL SEQUENCES IN SCHEMA public FROM :"trainer";

SELECT format('GRANT %s ON TABLE public.%I TO %I', allowed, name, :'trainer')
  FROM (VALUES ('alembic_version', 'SELECT'),
               ('patient', 'SELECT'),
               ('study', 'SELECT'),
               ('instance', 'SELECT'),
               ('label', 'SELECT'),
               ('flag', 'SELECT, INSERT, UPDATE, DELETE'),  -- of the rows below alone
               ('run', 'SELECT, INSERT, UPDATE'),
               ('timing', 'SELECT, INSERT, UPDATE, DELETE'),
               ('role', 'SELECT, INSERT, UPDATE, DELETE'),
               ('history', 'SELECT, INSERT')) AS rights (name, allowed)
 WHERE to_regclass(format('public.%I', name)) IS NOT NULL \gexec

SELECT format('GRANT USAGE ON SEQUENCE public.%I TO %I', name, :'trainer')
  FROM unnest(ARRAY['run_id_seq', 'history_id_seq']) AS name
 WHERE to_regclass(format('public.%I', name)) IS NOT NULL \gexec

-- Of the switches it reads all and writes those of the schedules: a renamed schedule keeps its pause.
SELECT statement
  FROM unnest(ARRAY[
         'ALTER TABLE public.flag ENABLE ROW LEVEL SECURITY',
         'DROP POLICY IF EXISTS osteon_trainer_reads ON public.flag',
         'DROP POLICY IF EXISTS osteon_trainer_pauses ON public.flag',
         format('CREATE POLICY osteon_trainer_reads ON public.flag FOR SELECT TO %I USING (true)', :'trainer'),
         format('CREATE POLICY osteon_trainer_pauses ON public.flag TO %I USING (name LIKE %L) WITH CHECK (name LIKE %L)',
                :'trainer', 'schedule %', 'schedule %')]) AS statement
 WHERE to_regclass('public.flag') IS NOT NULL \gexec

SELECT CASE WHEN to_regclass('public.study') IS NULL
            THEN 'no tables yet: start a role of Osteon as the owner (osteon check does), then run this once more'
            ELSE 'the rights of the trainer are set' END AS "Osteon";
