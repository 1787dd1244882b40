-- The ledger: one row a message that this service handled. Dedup store, outbox and audit log at once.
-- Ids tell their own day (UUID version 8, milliseconds first), so a day is a partition and is dropped whole.
CREATE TABLE ledger (
    id                   uuid        NOT NULL,
    root                 text,                              -- only where the root is not `id:<id>`
    opening              integer     NOT NULL DEFAULT 0,
    disposition          text        NOT NULL CHECK (disposition IN ('claimed', 'done', 'dead', 'discarded')),
    reason               text,
    detail               text,
    topic                text        NOT NULL,              -- coordinates recorded for the row's current opening
    partition            integer     NOT NULL,
    "offset"             bigint      NOT NULL,
    body_hash            bytea,                             -- of opening 0
    kind                 text        NOT NULL,
    business_object_type text,
    business_object_id   text,
    instance_id          uuid,
    correlation_id       text,
    cause_id             text,
    actor                text,
    note                 bytea,                             -- compact JSON: step, version, commit, fields touched
    emitted              bytea,                             -- message.pack(); for the dedup horizon
    seen                 integer     NOT NULL DEFAULT 1,
    handled_at           timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (id)
) PARTITION BY RANGE (id);

-- Roots that are not ids of ours: strangers' (source, id) and coordinates. Random keys, hence narrow.
CREATE TABLE gate (
    hash          uuid        PRIMARY KEY,
    ledger_id     uuid        NOT NULL,
    first_seen_at timestamptz NOT NULL DEFAULT now()
);

-- Rows with a due time that some replica claims, works on and settles: timers, attempts, sends, outcomes to publish.
-- due_at: pending = next attempt; leased = end of the lease; settled = publish (again) then; NULL = nothing is due.
CREATE TABLE claims (
    id             uuid        PRIMARY KEY,
    kind           text        NOT NULL,
    state          text        NOT NULL CHECK (state IN ('pending', 'leased', 'done', 'failed', 'unknown')),
    due_at         timestamptz,
    epoch          integer     NOT NULL DEFAULT 0,
    attempts       integer     NOT NULL DEFAULT 0,
    lease_ended_at timestamptz,
    tag            uuid,
    payload        bytea       NOT NULL,
    progress       bytea,
    outcome        bytea,                                   -- message.pack() of what a settlement emits
    created_at     timestamptz NOT NULL DEFAULT now(),
    settled_at     timestamptz
) WITH (fillfactor = 70);
CREATE INDEX claims_due ON claims (kind, due_at) WHERE due_at IS NOT NULL;

-- Messages that were being decoded when a process died, marked before decoding (after an unclean stop only).
CREATE TABLE attempt_mark (
    topic     text    NOT NULL,
    partition integer NOT NULL,
    "offset"  bigint  NOT NULL,
    attempts  integer NOT NULL,
    PRIMARY KEY (topic, partition, "offset")
);

-- Running processes: a row whose advisory lock nobody holds belongs to a process that did not stop cleanly.
CREATE TABLE process_mark (
    key        bigint      PRIMARY KEY,
    name       text        NOT NULL,
    started_at timestamptz NOT NULL DEFAULT now()
);

-- A day of the ledger, made on demand; idempotent. The caller holds no other lock.
CREATE FUNCTION ensure_ledger_day(name text, low uuid, high uuid) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended('factmesh.ledger_day.' || current_schema(), 0));
    IF to_regclass(quote_ident(name)) IS NULL THEN
        EXECUTE format(
            'CREATE TABLE %I PARTITION OF ledger FOR VALUES FROM (%L) TO (%L) WITH (fillfactor = 90)', name, low, high);
    END IF;
END $$;
