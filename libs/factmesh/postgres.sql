-- name: create_migrations_table
-- The record of what was applied here: one row a file, with the hash of what it said then.
CREATE TABLE IF NOT EXISTS migrations (
    namespace  text        NOT NULL,
    number     integer     NOT NULL,
    name       text        NOT NULL,
    sha256     text        NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (namespace, number)
);

-- name: lock_migrations
-- One replica at a time: waits, for as long as this connection lives, for the schema's own advisory lock.
SELECT pg_advisory_lock(hashtextextended('factmesh.migrations.' || $1, 0));

-- name: unlock_migrations
-- Lets the next replica in; a lost connection does the same.
SELECT pg_advisory_unlock(hashtextextended('factmesh.migrations.' || $1, 0));

-- name: applied_migrations
-- Everything ever applied in this schema, oldest first.
SELECT namespace, number, name, sha256 FROM migrations ORDER BY namespace, number;

-- name: record_migration
-- Runs in the transaction of the migration itself: both or neither.
INSERT INTO migrations (namespace, number, name, sha256) VALUES ($1, $2, $3, $4);

-- name: own_schema_statements
-- The statements that give $2 (a role) the schema $1 and nothing else, quoted by PostgreSQL itself; $3 is its password or NULL.
-- Idempotent; the caller runs them in order inside one transaction, under the advisory lock of `lock_roles`.
SELECT statement
  FROM (VALUES
    (1, CASE WHEN EXISTS (SELECT 1 FROM pg_roles WHERE rolname = $2) THEN NULL
             ELSE format('CREATE ROLE %I LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOINHERIT', $2::text) END),
    (2, CASE WHEN $3::text IS NULL THEN NULL ELSE format('ALTER ROLE %I PASSWORD %L', $2::text, $3::text) END),
    (3, format('GRANT %I TO CURRENT_USER', $2::text)),
    (4, format('CREATE SCHEMA IF NOT EXISTS %I AUTHORIZATION %I', $1::text, $2::text)),
    (5, format('REVOKE ALL ON SCHEMA %I FROM PUBLIC', $1::text)),
    (6, 'REVOKE ALL ON SCHEMA public FROM PUBLIC'),
    (7, format('REVOKE TEMPORARY, CREATE ON DATABASE %I FROM PUBLIC', current_database())),
    (8, format('GRANT CONNECT ON DATABASE %I TO %I', current_database(), $2::text)),
    (9, format('ALTER ROLE %I SET search_path = %I', $2::text, $1::text))
  ) AS plan (step, statement)
 WHERE statement IS NOT NULL
 ORDER BY step;

-- name: lock_roles
-- Roles and grants are rows that all schemas share: one change at a time, until the transaction ends.
SELECT pg_advisory_xact_lock(hashtextextended('factmesh.roles', 0));

-- name: drop_schema_statements
-- The statements that remove schema $1 and role $2 with everything that they own, if they are there.
SELECT statement
  FROM (VALUES
    (1, format('DROP SCHEMA IF EXISTS %I CASCADE', $1::text)),
    (2, CASE WHEN EXISTS (SELECT 1 FROM pg_roles WHERE rolname = $2) THEN format('DROP OWNED BY %I', $2::text) END),
    (3, format('DROP ROLE IF EXISTS %I', $2::text))
  ) AS plan (step, statement)
 WHERE statement IS NOT NULL
 ORDER BY step;

-- name: notify
-- A hint that rows of a channel became due; delivered when the transaction commits, or never: nobody relies on it.
SELECT pg_notify($1, '');

-- name: alive
-- Answers when the database can serve.
SELECT 1;
