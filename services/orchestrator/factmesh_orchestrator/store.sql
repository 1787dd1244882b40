-- name: load
-- The objects exist where asked for, are locked in order, and what is read of them is younger than the locks.
SELECT object_type, object_id, active, active_workflows, instance_id, state FROM load_objects($1, $2, $3, $4);

-- name: find_objects
-- The business object of an instance; it never changes, so it may be read outside the lock.
SELECT id, object_type, object_id FROM instances WHERE id = ANY ($1::uuid[]);

-- name: save
-- Everything that a batch changed, in one statement. Instances move on only from the seq that was loaded (INV-F):
-- the counts tell whether every row was there.
WITH objects AS (
    UPDATE business_objects b
       SET active = o.active::uuid[], active_workflows = o.active_workflows::text[], waiting = o.waiting
      FROM unnest($9::text[], $10::text[], $11::text[], $12::text[], $13::bytea[])
           AS o (object_type, object_id, active, active_workflows, waiting)
     WHERE b.object_type = o.object_type AND b.object_id = o.object_id
    RETURNING 1
), created AS (
    INSERT INTO instances (id, workflow, workflow_version, object_type, object_id, correlation_id, started_at, due_by,
                           seq, status, step, outcome, ended_at, state)
    SELECT * FROM unnest($14::uuid[], $15::text[], $16::text[], $17::text[], $18::text[], $19::text[],
                         $20::timestamptz[], $21::timestamptz[], $22::bigint[], $23::text[], $24::text[], $25::text[],
                         $26::timestamptz[], $27::bytea[])
), moved AS (
    UPDATE instances i
       SET seq = m.seq, status = m.status, step = m.step, outcome = m.outcome, ended_at = m.ended_at, state = m.state
      FROM unnest($1::uuid[], $2::bigint[], $3::bigint[], $4::text[], $5::text[], $6::text[], $7::timestamptz[],
                  $8::bytea[]) AS m (id, seq_before, seq, status, step, outcome, ended_at, state)
     WHERE i.id = m.id AND i.seq = m.seq_before
    RETURNING 1
)
SELECT (SELECT count(*) FROM objects) AS objects, (SELECT count(*) FROM moved) AS moved;

-- name: save_moved
-- What most results change: instances only, from the seq that was loaded (INV-F); a third of `save`'s time for one.
WITH moved AS (
    UPDATE instances i
       SET seq = m.seq, status = m.status, step = m.step, outcome = m.outcome, ended_at = m.ended_at, state = m.state
      FROM unnest($1::uuid[], $2::bigint[], $3::bigint[], $4::text[], $5::text[], $6::text[], $7::timestamptz[],
                  $8::bytea[]) AS m (id, seq_before, seq, status, step, outcome, ended_at, state)
     WHERE i.id = m.id AND i.seq = m.seq_before
    RETURNING 1
)
SELECT 0 AS objects, count(*) AS moved FROM moved;

-- name: attend
-- What operators look for: those that need a person are there with the time since when, the others are not.
WITH noticed AS (
    INSERT INTO attention AS a (instance_id, status, workflow, step, reason, since)
    SELECT n.*, now() FROM unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::text[]) AS n
    ON CONFLICT (instance_id) DO UPDATE
       SET status = excluded.status, step = excluded.step, reason = excluded.reason,
           since = CASE WHEN a.status = excluded.status THEN a.since ELSE excluded.since END
)
DELETE FROM attention WHERE instance_id = ANY ($6::uuid[]);

-- name: current_definitions
-- The version of each workflow on which new instances start.
SELECT name, version, content_hash, yaml, policies, commit_id FROM definitions WHERE is_current;

-- name: definition
-- One deployed version, whether current or not: running instances stay on it.
SELECT name, version, content_hash, yaml, policies, commit_id FROM definitions WHERE name = $1 AND version = $2;

-- name: lock_definitions
-- One deployment at a time; held until the transaction ends.
SELECT pg_advisory_xact_lock(hashtextextended('factmesh.definitions.' || current_schema(), 0));

-- name: insert_definition
-- A version is written once.
INSERT INTO definitions (name, version, content_hash, yaml, policies, is_current, deployed_by, commit_id)
VALUES ($1, $2, $3, $4, $5, false, $6, $7);

-- name: clear_current
-- No version of the workflow is current; the same transaction makes one.
UPDATE definitions SET is_current = false WHERE name = $1 AND is_current;

-- name: make_current
-- This version is the current one; the index refuses a second.
UPDATE definitions SET is_current = true WHERE name = $1 AND version = $2;

-- name: record_act
-- Each deployment is audited; rows are only added.
INSERT INTO definition_acts (act, name, version, content_hash, by, commit_id) VALUES ($1, $2, $3, $4, $5, $6);

-- name: open_before
-- Instances that have not ended and began before an id, in the order of their ids, from one on.
SELECT id, workflow, workflow_version, object_type, object_id, correlation_id, seq
  FROM instances WHERE id > $1 AND id < $2 AND ended_at IS NULL ORDER BY id LIMIT $3;

-- name: attention_counts
-- How many instances of each workflow need a person, and for how long the oldest has; ends with the act that settles it.
SELECT workflow, status, count(*) AS n, extract(epoch FROM now() - min(since))::double precision AS oldest_s
  FROM attention GROUP BY workflow, status;
