-- name: ensure_day
-- The day's partition exists afterwards, whoever made it.
SELECT ensure_ledger_day($1, $2, $3);

-- name: days
-- The days that the ledger holds, as partition names.
SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
 WHERE i.inhparent = to_regclass('ledger') ORDER BY 1;

-- name: enter_gate
-- First sight of a root is recorded once; who loses the race waits for the winner and adds nothing. Sorted: no deadlock.
INSERT INTO gate (hash, ledger_id)
SELECT g.hash, g.ledger_id FROM unnest($1::uuid[], $2::uuid[]) AS g (hash, ledger_id) ORDER BY g.hash
ON CONFLICT (hash) DO NOTHING;

-- name: read_gate
-- Which ledger row each root has; a statement after `enter_gate`, so that it sees what that one waited for.
SELECT hash, ledger_id FROM gate WHERE hash = ANY ($1::uuid[]);

-- name: gate_fresh
-- Plain insert on the fast path: a repeat raises a unique violation and the batch reruns on the slow path.
INSERT INTO gate (hash, ledger_id)
SELECT g.hash, g.ledger_id FROM unnest($1::uuid[], $2::uuid[]) AS g (hash, ledger_id) ORDER BY g.hash;

-- name: claim_rows
-- Slow path: which ids are fresh. The row is locked by its insertion; who comes second waits, then finds it.
INSERT INTO ledger (id, disposition, topic, partition, "offset", kind)
SELECT r.id, 'claimed', r.topic, r.partition, r."offset", ''
  FROM unnest($1::uuid[], $2::text[], $3::integer[], $4::bigint[]) AS r (id, topic, partition, "offset")
 ORDER BY r.id
ON CONFLICT (id) DO NOTHING
RETURNING id;

-- name: read_rows
-- What is recorded of ids that were there, locked; a statement after the insert, so that the snapshot is not too old.
SELECT id, opening, disposition, topic, partition, "offset", body_hash, emitted
  FROM ledger WHERE id = ANY ($1::uuid[]) ORDER BY id FOR UPDATE;

-- name: insert_row
-- Fast path: one whole row a message; an id that is there raises a unique violation and nothing of the batch stays.
INSERT INTO ledger (id, root, opening, disposition, reason, detail, topic, partition, "offset", body_hash, kind,
                    business_object_type, business_object_id, instance_id, correlation_id, cause_id, actor, note, emitted)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19);

-- name: has_any
-- A projection's fast path: whether one of the ids was recorded, so that the slow path must judge it.
SELECT EXISTS (SELECT 1 FROM ledger WHERE id = ANY ($1::uuid[]));

-- name: finish_rows
-- Slow path: what became of the rows that this transaction claimed or opened; opening 0's body hash stays for ever.
UPDATE ledger l
   SET root = r.root, opening = r.opening, disposition = r.disposition, reason = r.reason, detail = r.detail,
       topic = r.topic, partition = r.partition, "offset" = r."offset",
       body_hash = coalesce(l.body_hash, r.body_hash), kind = r.kind,
       business_object_type = r.object_type, business_object_id = r.object_id, instance_id = r.instance_id,
       correlation_id = r.correlation_id, cause_id = r.cause_id, actor = r.actor, note = r.note, emitted = r.emitted,
       handled_at = now()
  FROM unnest($1::uuid[], $2::text[], $3::integer[], $4::text[], $5::text[], $6::text[], $7::text[],
              $8::integer[], $9::bigint[], $10::bytea[], $11::text[], $12::text[], $13::text[], $14::uuid[],
              $15::text[], $16::text[], $17::text[], $18::bytea[], $19::bytea[])
       AS r (id, root, opening, disposition, reason, detail, topic, partition, "offset", body_hash, kind, object_type,
             object_id, instance_id, correlation_id, cause_id, actor, note, emitted)
 WHERE l.id = r.id;

-- name: forget_rows
-- Slow path: claims of this transaction on an own id whose message died; the twin that comes later is judged afresh.
DELETE FROM ledger WHERE id = ANY ($1::uuid[]) AND disposition = 'claimed';

-- name: raise_seen
-- A repeat writes no row, it is counted.
UPDATE ledger l SET seen = l.seen + r.n
  FROM unnest($1::uuid[], $2::integer[]) AS r (id, n) WHERE l.id = r.id;

-- name: mark_row
-- An earlier message's disposition is changed by a later decision; `emitted` is what was emitted, and more.
UPDATE ledger SET disposition = $2, reason = $3, detail = $4, handled_at = now() WHERE id = $1 RETURNING opening;

-- name: mark_root
-- The ledger row of a root that is no id of ours, for `mark_row`.
SELECT ledger_id FROM gate WHERE hash = $1;

-- name: mark_attempt
-- Durable before the message is touched: counts how often a process died with it in hand.
INSERT INTO attempt_mark (topic, partition, "offset", attempts) VALUES ($1, $2, $3, 1)
ON CONFLICT (topic, partition, "offset") DO UPDATE SET attempts = attempt_mark.attempts + 1
RETURNING attempts;

-- name: clear_attempt
-- The message is through.
DELETE FROM attempt_mark WHERE topic = $1 AND partition = $2 AND "offset" = $3;

-- name: enter_process
-- This process is running, as long as it holds the advisory lock of the same key.
INSERT INTO process_mark (key, name) VALUES ($1, $2);

-- name: lock_process
-- Held by the process's own connection until it ends, however it ends.
SELECT pg_advisory_lock(hashtextextended('factmesh.process.' || current_schema(), $1));

-- name: dead_processes
-- Rows of processes that ended without saying so: their lock is free. They are removed, each by one finder.
DELETE FROM process_mark p
 WHERE pg_try_advisory_xact_lock(hashtextextended('factmesh.process.' || current_schema(), p.key))
RETURNING name;

-- name: leave_process
-- A clean stop.
DELETE FROM process_mark WHERE key = $1;

-- name: gate_expire
-- Strangers' ids live for the dedup horizon, by first sight; those whose row is dead stay, an opening must find them.
DELETE FROM gate g
 WHERE g.first_seen_at < now() - make_interval(days => $1)
   AND NOT EXISTS (SELECT 1 FROM ledger l WHERE l.id = g.ledger_id AND l.disposition = 'dead');

-- name: emitted_expire
-- Emitted bytes live for the horizon; the row stays for the audit period. Part of a day, from an id on: a whole one may
-- not fit a transaction's time.
WITH old AS (
    SELECT id FROM ledger WHERE id >= $1 AND id < $2 AND emitted IS NOT NULL ORDER BY id LIMIT $3
)
UPDATE ledger l SET emitted = NULL FROM old WHERE l.id = old.id RETURNING l.id;

-- name: day_is_free
-- Whether a day may be dropped: none of its rows is quarantined (`dead`) or unfinished.
SELECT NOT EXISTS (SELECT 1 FROM ledger WHERE id >= $1 AND id < $2 AND disposition IN ('claimed', 'dead'));

-- name: drop_day_statement
-- The statement that drops one day whole, quoted by PostgreSQL itself.
SELECT format('DROP TABLE IF EXISTS %I', $1::text);

-- name: alive
-- Whether the database serves.
SELECT 1;

-- name: emitted_since
-- What was emitted since an instant, in a stable order, a page at a time: for publishing it again after Kafka lost data.
SELECT id, handled_at, emitted FROM ledger
 WHERE handled_at >= $1 AND emitted IS NOT NULL AND (handled_at, id) > ($2, $3)
 ORDER BY handled_at, id LIMIT $4;

-- name: count_emitted_since
-- How many rows `emitted_since` will give.
SELECT count(*) FROM ledger WHERE handled_at >= $1 AND emitted IS NOT NULL;
