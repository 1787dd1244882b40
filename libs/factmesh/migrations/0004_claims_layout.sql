-- The same table laid out for its one update (decision 12): what never changes stands first, and a page keeps room for
-- the settled row beside the claimed one. Then the log of an update holds what changed, not the payload once more.
CREATE TABLE claims_laid_out (
    id             uuid        NOT NULL,
    kind           text        NOT NULL,
    tag            uuid,
    created_at     timestamptz NOT NULL DEFAULT now(),
    payload        bytea       NOT NULL,
    epoch          integer     NOT NULL DEFAULT 0,
    attempts       integer     NOT NULL DEFAULT 0,
    state          text        NOT NULL CHECK (state IN ('pending', 'leased', 'done', 'failed', 'unknown')),
    due_at         timestamptz,                             -- pending: next attempt; leased: end of the lease; else NULL
    lease_ended_at timestamptz,
    settled_at     timestamptz,
    progress       bytea,
    outcome        bytea                                    -- message.pack() of what a settlement emits
) WITH (fillfactor = 45);
INSERT INTO claims_laid_out (id, kind, tag, created_at, payload, epoch, attempts, state, due_at, lease_ended_at,
                             settled_at, progress, outcome)
SELECT id, kind, tag, created_at, payload, epoch, attempts, state, due_at, lease_ended_at, settled_at, progress, outcome
  FROM claims;
DROP TABLE claims;
ALTER TABLE claims_laid_out RENAME TO claims;
ALTER TABLE claims ADD CONSTRAINT claims_pkey PRIMARY KEY (id);
CREATE INDEX claims_due ON claims (kind, due_at) WHERE due_at IS NOT NULL;
CREATE INDEX claims_unknown ON claims (kind) WHERE state = 'unknown';
