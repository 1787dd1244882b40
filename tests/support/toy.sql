-- name: lock
-- The objects exist and are locked until the transaction ends.
INSERT INTO thing (key, n) SELECT k, 0 FROM unnest($1::text[]) AS k ORDER BY k ON CONFLICT DO NOTHING;

-- name: load
-- Read in a statement after the lock.
SELECT key, n FROM thing WHERE key = ANY ($1::text[]) ORDER BY key FOR UPDATE;

-- name: save
-- All objects of a batch together.
UPDATE thing t SET n = s.n, last = s.last FROM unnest($1::text[], $2::integer[], $3::text[]) AS s (key, n, last)
 WHERE t.key = s.key;

-- name: save_work
-- Rides in a settlement: the epochs that count, under a text of the work's.
INSERT INTO thing (key, n) SELECT s.key, s.epoch FROM unnest($1::uuid[], $2::integer[], $3::text[]) AS s (id, epoch, key)
 WHERE ((s.id, s.epoch) IN (TABLE counted)) IS TRUE;

-- name: rows
-- For assertions.
SELECT key, n FROM thing;

-- name: see
-- A projection's save: a row with a higher number than the message's stays as it is.
INSERT INTO thing AS t (key, n, last) SELECT s.* FROM unnest($1::text[], $2::integer[], $3::text[]) AS s (key, n, last)
 ORDER BY 1 ON CONFLICT (key) DO UPDATE SET n = excluded.n, last = excluded.last WHERE excluded.n > t.n;
