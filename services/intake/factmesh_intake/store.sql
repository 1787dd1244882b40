-- Intake's own state: what is said of a fact to the one who sent it. The gate and the ledger are the library's.

-- name: put_progress
-- One row a fact. Accepted replaces quarantined; quarantined never replaces accepted (a conflict, a torn repeat).
INSERT INTO progress AS p (
    correlation_id, source, source_id, type, stage, business_object_type, business_object_id, due_by, reason
)
SELECT * FROM unnest(
    $1::uuid[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[], $8::timestamptz[], $9::text[]
) AS n (
    correlation_id, source, source_id, type, stage, business_object_type, business_object_id, due_by, reason
)
ORDER BY n.correlation_id
ON CONFLICT (correlation_id) DO UPDATE SET
    stage = excluded.stage,
    type = excluded.type,
    business_object_type = coalesce(excluded.business_object_type, p.business_object_type),
    business_object_id = coalesce(excluded.business_object_id, p.business_object_id),
    due_by = coalesce(excluded.due_by, p.due_by),
    reason = excluded.reason,
    updated_at = now()
WHERE excluded.stage = 'accepted' OR p.stage = 'quarantined'

-- name: put_instances
-- One row an instance; a message with a lower sequence number than one that was seen changes nothing.
INSERT INTO progress_instances AS p (
    correlation_id, instance_id, instance_seq, workflow, status, step, next_step, outcome, reason, due_by
)
SELECT * FROM unnest(
    $1::uuid[], $2::uuid[], $3::bigint[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[], $9::text[],
    $10::timestamptz[]
) AS n (
    correlation_id, instance_id, instance_seq, workflow, status, step, next_step, outcome, reason, due_by
)
ORDER BY n.correlation_id, n.instance_id
ON CONFLICT (correlation_id, instance_id) DO UPDATE SET
    instance_seq = excluded.instance_seq,
    status = excluded.status,
    step = excluded.step,
    next_step = excluded.next_step,
    outcome = excluded.outcome,
    reason = excluded.reason,
    due_by = excluded.due_by,
    updated_at = now()
WHERE excluded.instance_seq > p.instance_seq

-- name: get_progress
-- The fact with its instances, the latest change first; one row with nulls for a fact without an instance.
SELECT p.correlation_id, p.source, p.source_id, p.type, p.stage, p.business_object_type, p.business_object_id,
       p.due_by, p.reason, p.received_at, p.updated_at,
       i.instance_id, i.workflow, i.status, i.step, i.next_step, i.outcome, i.reason AS instance_reason,
       i.due_by AS instance_due_by, i.updated_at AS instance_updated_at
FROM progress p LEFT JOIN progress_instances i USING (correlation_id)
WHERE p.correlation_id = $1
ORDER BY i.updated_at DESC NULLS LAST
LIMIT 100

-- name: forget_progress
-- Removes at most $2 facts that entered before day $1, oldest first; returns how many.
WITH gone AS (
    DELETE FROM progress WHERE correlation_id IN (
        SELECT correlation_id FROM progress WHERE day < $1::date ORDER BY day LIMIT $2::int
    ) RETURNING 1
) SELECT count(*) FROM gone

-- name: forget_instances
-- As forget_progress, for what was said of instances.
WITH gone AS (
    DELETE FROM progress_instances WHERE (correlation_id, instance_id) IN (
        SELECT correlation_id, instance_id FROM progress_instances WHERE day < $1::date ORDER BY day LIMIT $2::int
    ) RETURNING 1
) SELECT count(*) FROM gone
