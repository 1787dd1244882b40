-- Settled outcomes that are not known to be published (decision 12): a row for all that one statement settled, so that
-- the mark `published` rewrites none of theirs. Short-lived, and small: no index besides the key.
CREATE TABLE unpublished (
    id         bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    kind       text        NOT NULL,
    due_at     timestamptz NOT NULL,                        -- publish (again) then, whoever looks first
    settled_at timestamptz NOT NULL DEFAULT now(),
    ids        uuid[]      NOT NULL,
    epochs     integer[]   NOT NULL                         -- of each id: another epoch's outcome is another's to tell
);
-- Ids are hashes for the most part: compressing them is work for nothing.
ALTER TABLE unpublished ALTER COLUMN ids SET STORAGE EXTERNAL;

INSERT INTO unpublished (kind, due_at, settled_at, ids, epochs)
SELECT kind, now(), min(settled_at), array_agg(id), array_agg(epoch)
  FROM claims WHERE due_at IS NOT NULL AND state NOT IN ('pending', 'leased') AND outcome IS NOT NULL GROUP BY kind;
UPDATE claims SET due_at = NULL WHERE due_at IS NOT NULL AND state NOT IN ('pending', 'leased');
COMMENT ON COLUMN claims.due_at IS 'pending: the next attempt; leased: the end of the lease; settled: NULL';
