-- The ideal loop's tables: what dedup, the outbox, a row lock and a claimed command need, and nothing else.
CREATE TABLE gate (hash uuid PRIMARY KEY, ledger_id uuid NOT NULL);
CREATE TABLE ledger (
    id uuid PRIMARY KEY, topic text NOT NULL, partition integer NOT NULL, "offset" bigint NOT NULL, emitted bytea
);
CREATE TABLE instances (id uuid PRIMARY KEY, seq bigint NOT NULL, state bytea NOT NULL) WITH (fillfactor = 50);
CREATE TABLE claims (
    id uuid PRIMARY KEY, state text NOT NULL, epoch integer NOT NULL, due_at timestamptz, payload bytea NOT NULL,
    outcome bytea
) WITH (fillfactor = 70);
CREATE INDEX claims_due ON claims (due_at) WHERE due_at IS NOT NULL;
