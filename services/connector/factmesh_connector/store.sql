-- name: lock_keys
-- The holders of these keys, locked until the batch is written. Sorted: no deadlock.
SELECT idempotency_key, command_id, body_hash FROM keys
 WHERE idempotency_key = ANY ($1::uuid[]) ORDER BY idempotency_key FOR UPDATE;

-- name: insert_keys
-- Keys that nobody holds. One that is held raises the unique violation, and the batch is run again from a load that
-- reads and locks it first.
INSERT INTO keys (idempotency_key, command_id, body_hash)
SELECT k.* FROM unnest($1::uuid[], $2::uuid[], $3::bytea[]) AS k ORDER BY 1;

-- name: pass_keys
-- Keys that a known failure has freed, to their new holder; the row is locked since `lock_keys`.
UPDATE keys k SET command_id = n.command_id, body_hash = n.body_hash
  FROM unnest($1::uuid[], $2::uuid[], $3::bytea[]) AS n (idempotency_key, command_id, body_hash)
 WHERE k.idempotency_key = n.idempotency_key;

-- name: expire_keys
-- A key outlives every message that can carry it: keys go with the audit period, by the day in them.
DELETE FROM keys WHERE idempotency_key < $1;

-- name: insert_calls
-- Rides in the settlement of attempts: theirs that count; (command, epoch) is settled once, so a line is written once.
INSERT INTO calls (command_id, epoch, ordinal, operation, what, at, ms, ended)
SELECT c.* FROM unnest($1::uuid[], $2::integer[], $3::smallint[], $4::text[], $5::text[], $6::timestamptz[],
                       $7::integer[], $8::text[]) AS c (command_id, epoch, ordinal, operation, what, at, ms, ended)
 WHERE ((c.command_id, c.epoch) IN (TABLE counted)) IS TRUE;

-- name: expire_calls
-- Calls of commands of days that the audit period has passed.
DELETE FROM calls WHERE command_id < $1;
