-- name: is_there
-- Whether this schema holds an index.
SELECT to_regclass('record');

-- name: enter_threads
-- Every thread of the batch has a row afterwards, whoever made it. Sorted: no deadlock.
INSERT INTO thread (id) SELECT t.id FROM unnest($1::uuid[]) AS t (id) ORDER BY t.id ON CONFLICT (id) DO NOTHING;

-- name: lock_threads
-- Nothing is written from what was read before this lock; a statement of its own, so that the next sees what it waited for.
SELECT id, counter FROM thread WHERE id = ANY ($1::uuid[]) ORDER BY id FOR UPDATE;

-- name: read_records
-- The records of the locked threads, locked too: a discard takes the record's lock only.
SELECT id, thread, state, raised, published, dead FROM record WHERE thread = ANY ($1::uuid[]) ORDER BY id FOR UPDATE;

-- name: read_openings
-- Which record raised which number.
SELECT thread, number, record FROM act WHERE thread = ANY ($1::uuid[]) AND verb <> 'discard'
UNION
SELECT thread, raised, id FROM record WHERE thread = ANY ($1::uuid[]) AND raised > 0;

-- name: read_deaths
-- Which of these deaths are filed already.
SELECT id FROM death WHERE id = ANY ($1::uuid[]);

-- name: save_threads
-- The counter only rises.
UPDATE thread t SET counter = greatest(t.counter, r.counter)
  FROM unnest($1::uuid[], $2::integer[]) AS r (id, counter) WHERE t.id = r.id AND t.counter < r.counter;

-- name: insert_records
-- One row a quarantined message.
INSERT INTO record (id, thread, root, grp, state, raised, published, dead, owner, topic, partition, "offset", reason,
                    error_class, stage, step, exception_type, fingerprint, message, stack, attempts, service,
                    service_version, first_failed_at, failed_at, instance_id, correlation_id, trace_id, command_id,
                    business_object_type, business_object_id, kind, workflow, original, opened_at)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20, $21, $22, $23, $24,
        $25, $26, $27, $28, $29, $30, $31, $32, $33, $34, $35);

-- name: update_records
-- The latest death of a record that is there; its original bytes stay the first ones. A refused resolution ($15 false) or
-- retry (on another topic) leaves the diagnosis of the command itself: its reason decides what may be done.
UPDATE record SET
    state = $2, raised = $3, published = $4, dead = $5, message = $6, failed_at = $7, opened_at = $8, closed_at = NULL,
    error_class = $9, exception_type = $10, stage = $11, stack = $12,
    attempts = CASE WHEN $15 AND topic = $22 THEN $13 ELSE attempts END,
    fingerprint = CASE WHEN $15 AND topic = $22 THEN $14 ELSE fingerprint END,
    reason = CASE WHEN $15 AND topic = $22 THEN $16 ELSE reason END,
    partition = CASE WHEN $15 AND topic = $22 THEN $17 ELSE partition END,
    "offset" = CASE WHEN $15 AND topic = $22 THEN $18 ELSE "offset" END,
    step = coalesce($19, step), instance_id = coalesce(instance_id, $20), command_id = coalesce(command_id, $21)
 WHERE id = $1;

-- name: insert_deaths
-- A death is filed once.
INSERT INTO death (id, record, opening, topic, partition, "offset")
SELECT * FROM unnest($1::uuid[], $2::uuid[], $3::integer[], $4::text[], $5::integer[], $6::bigint[])
ON CONFLICT (id) DO NOTHING;

-- name: insert_history
-- The audit grows, it never changes.
INSERT INTO history (record, at, by, event, number, before, after, detail)
SELECT r.record, $2, $3, r.event, r.number, r.before, r.after, r.detail
  FROM unnest($1::uuid[], $4::text[], $5::integer[], $6::text[], $7::text[], $8::text[])
       WITH ORDINALITY AS r (record, event, number, before, after, detail, n)
 ORDER BY r.n;

-- name: mark_acts_dead
-- Which acts did not help, and when: for the success rate.
UPDATE act a SET died_at = coalesce(a.died_at, $3), published_at = coalesce(a.published_at, $3)
  FROM unnest($1::uuid[], $2::integer[]) AS d (thread, number)
 WHERE a.thread = d.thread AND a.number = d.number AND a.verb <> 'discard';

-- name: save_progress
-- How far each partition is filed; a reader that is behind never takes it back.
INSERT INTO progress (topic, partition, next_offset)
SELECT p.topic, p.partition, p.next_offset FROM unnest($1::text[], $2::integer[], $3::bigint[])
       AS p (topic, partition, next_offset) ORDER BY 1, 2
ON CONFLICT (topic, partition) DO UPDATE SET next_offset = greatest(progress.next_offset, excluded.next_offset);

-- name: read_progress
-- From where to read on.
SELECT topic, partition, next_offset FROM progress;

-- name: forget_bytes
-- Quarantined bytes live while they are open; afterwards for $1 days, for people who look back.
UPDATE record SET original = NULL, correction = NULL
 WHERE closed_at < now() - make_interval(days => $1) AND state NOT IN ('open', 'failed_again')
   AND original IS NOT NULL AND NOT EXISTS (SELECT 1 FROM act a WHERE a.record = record.id AND a.published_at IS NULL);
